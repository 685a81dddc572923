import csv
import json
import re

import numpy as np
import pytest
import torch

from zoo.cli import main
from zoo.media import read_image, write_image
from zoo.models import create
from zoo.models.weights import write_weights
from zoo.shipped import find_recipe

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    top = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    conv = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2}
    write_weights(top / "one.safetensors", create(conv))
    write_weights(top / "two.safetensors", create(conv))
    for name in ("a.png", "b.png"):
        write_image(top / "gt" / name, np.kron(RNG.random((5, 6, 3)), np.ones((8, 8, 1))))
    return top


@pytest.fixture
def zoo(place, monkeypatch, capsys):
    monkeypatch.chdir(place)

    def call(*words):
        code = main([*map(str, words)])
        out, err = capsys.readouterr()
        return code, out, "\n".join(line for line in err.splitlines() if not line.startswith("weights "))

    return call


def test_table_says_how_every_number_was_measured(zoo):
    code, out, err = zoo("evaluate", "--model", "one.safetensors", "--data", "gt", "--lpips", "none.pth")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "gt, x2, input: bicubic"
    assert "PSNR-Y, crop 2, uint8 [dB]" in lines[1]
    assert "SSIM-Y, crop 2, uint8" in lines[1]
    assert "PSNR-RGB, crop 2, uint8: bicubic " in out
    assert "SSIM-RGB, crop 2, uint8: bicubic 0." in out
    assert re.search(r"LPIPS, RGB, crop 2, uint8: n/a \(file .*none\.pth not found\)", out)
    assert lines[2].split() == ["image", "size", "bicubic", "one.safetensors", "gain", "bicubic", "one.safetensors"]
    assert lines[3].split()[:2] == ["a.png", "48x40"]
    mean = next(line.split() for line in lines if line.startswith("mean"))
    assert mean[:3] == ["mean", "2", "images"]
    assert float(mean[4]) - float(mean[3]) == pytest.approx(float(mean[5]), abs=0.011)
    assert len({len(line) for line in lines[2:6]}) == 1  # columns stand under their heads


def test_compare_shows_every_model_and_writes_its_files(zoo, place):
    words = ("compare", "bicubic", "one.safetensors", "two.safetensors", "--data", "gt", "--jpeg", "50", "--out", "cmp")
    code, out, _ = zoo(*words)
    assert code == 0
    assert "gain 1" in out
    assert "gain 2" in out
    assert "input: bicubic+jpeg50" in out
    with (place / "cmp/scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2
    assert {row["protocol"] for row in rows} == {"PSNR-Y, crop 2, uint8"}
    assert float(rows[2]["psnr"]) - float(rows[2]["bicubic_psnr"]) == pytest.approx(float(rows[2]["gain"]), abs=1e-5)
    assert len(json.loads((place / "cmp/scores.json").read_text())) == 3
    assert set(rows[0]) >= {"psnr_rgb", "ssim_rgb", "bicubic_psnr_rgb", "lpips"}
    pictures = sorted(path.name for path in (place / "cmp/worst").iterdir())
    assert [name[:17] for name in pictures] == ["bicubic_jpeg50_1_", "bicubic_jpeg50_2_"]
    assert read_image(place / "cmp/worst" / pictures[0]).pixels.ndim == 3
    page = (place / "cmp/report.html").read_text(encoding="utf-8")
    assert page.count('class="slider"') == 4
    assert "one.safetensors: weights" in page
    code, out, err = zoo(*words)
    assert code == 2
    assert "exists already; --force replaces it" in err
    assert out == ""
    assert zoo(*words, "--force")[0] == 0


def test_json_holds_means_rows_and_protocol(zoo):
    code, out, _ = zoo(
        "evaluate", "--model", "bicubic", "--upscale", "2", "--data", "gt", "--protocol", "rgb", "--json"
    )
    assert code == 0
    (found,) = json.loads(out)
    assert found["psnr_protocol"] == "PSNR-RGB, crop 2, uint8"
    assert found["mean"]["gain"] == 0
    assert len(found["rows"]) == 2


def test_papers_figure_stands_below_ours(zoo, place):
    network = create({"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 4})
    network.variant = "hat-x4"  # what a file of official weights would be recognised as
    write_weights(place / "four.safetensors", network, force=True)
    (place / "Set5").mkdir(exist_ok=True)
    write_image(place / "Set5/baby.png", RNG.random((48, 48, 3)))
    code, out, _ = zoo("evaluate", "--model", "four.safetensors", "--data", "set5")
    assert code == 0
    lines = out.splitlines()
    paper = next(line for line in lines if line.startswith("paper"))
    ours = next(line for line in lines if line.startswith("mean"))
    assert paper.split() == ["paper", "33.04", "dB"]
    column = lines[2].index("four.safetensors")
    assert ours[column : column + 16].strip() == ours.split()[4]
    assert paper[column : column + 16].strip() == "33.04 dB"
    assert zoo("evaluate", "--model", "four.safetensors", "--data", "Set5", "--jpeg", "50")[1].count("33.04 dB") == 0


def test_shipped_recipe_is_read_and_flags_go_before_its_keys(zoo):
    assert find_recipe("photos-x2").is_file()
    code, out, _ = zoo("evaluate", "photos-x2", "--model", "one.safetensors", "--data", "gt")
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("gt,")] == [
        "gt, x2, input: bicubic",
        "gt, x2, input: bicubic+jpeg75",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: x\nprotokol: rgb\n", "unknown key 'protokol'. Did you mean 'protocol'?"),
        ("model: x\nupscale: two\n", "upscale must be a whole number, got 'two'"),
        ("model: x\nupscale: true\n", "upscale must be a whole number, got True"),
        ("model: x\ndegradation: [1]\n", "degradation must be a text"),
        ("model: {class_path: RestorationTask}\n", "no recipe for evaluation"),
        ("- a\n", "no recipe for evaluation"),
        ("a: [\n", "no readable YAML"),
    ],
)
def test_recipe_mistakes_are_one_sentence(zoo, place, text, words):
    (place / "r.yaml").write_text(text)
    code, _, err = zoo("evaluate", "r.yaml")
    assert code == 2
    assert words in err
    assert err.count("\n") == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["evaluate"], "no model; give a recipe such as photos-x2"),
        (["evaluate", "--model", "one.safetensors", "--data", "none"], "none: no such folder"),
        (["evaluate", "--model", "one.safetensors", "--upscale", "3"], "disagree"),
        (["evaluate", "--model", "nothing"], "neither a file nor a known model"),
        (["evaluate", "--model", "one.safetensors", "--out", "one.safetensors"], "is a file"),
        (["evaluate", "--model", "one.safetensors", "--worst", "-1"], "--worst must be 0 or more"),
        (["compare"], "the following arguments are required: MODEL"),
        (["evaluate", "--model", "one.safetensors", "--jpeg", "0"], "quality"),
        (["evaluate", "--model", "one.safetensors", "--split", "test"], "split must be train or valid, got 'test'"),
        (["evaluate", "--model", "one.safetensors", "--data", "demo", "--template", "{}x2"], "remove lq and template"),
    ],
)
def test_mistakes_are_one_sentence(zoo, words, sentence):
    code, out, err = zoo(*words)
    assert code == 2
    assert sentence in err
    assert (err.count("\n"), out) == (0, "")
