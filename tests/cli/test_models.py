import json

import pytest
import torch

from zoo import models, shipped
from zoo.cli import main
from zoo.models.weights import write_weights


def test_list_shows_every_model_with_its_facts(capsys):
    assert main(["list"]) == 0
    said, nothing, head, *rows = capsys.readouterr().out.splitlines()
    assert said.startswith("measured: photos, bicubic, PSNR-Y, crop = scale, uint8; paper: Set5 PSNR-Y, crop = scale")
    assert nothing == ""
    assert head.split() == ["model", "task", "scale", "parameters", "weights", "measured", "paper"]
    assert len(rows) == len(models.list_models())
    assert max(map(len, rows)) <= 110
    (row,) = [line for line in rows if line.startswith("hat-x4 ")]
    assert row.split() == ["hat-x4", "super-resolution", "x4", "20,772,507", "fetch", "33.04", "dB"]


def test_models_without_an_image_as_their_result_have_no_scale_and_no_headline(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shipped, "index", lambda: {"shapes-features": {"figures": {"blurred, FID": "30"}}})
    assert main(["list", "shapes-features"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["shapes-features", "features", "-", "284,152", "fetch"]
    network = models.create({"family": "plain-features", "widths": [8], "depths": [1]})
    path = write_weights(tmp_path / "mine.safetensors", network)
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task"] == "features"
    assert "upscale" not in facts
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["restore", str(tmp_path / "a.png"), "--model", str(path)]) == 2
    assert "'plain-features' restores no image" in capsys.readouterr().err


def test_list_takes_a_pattern_and_prints_json(capsys):
    assert main(["list", "hat-s*", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["hat-s-x2", "hat-s-x3", "hat-s-x4"]
    assert rows[0]["upscale"] == 2
    assert rows[0]["licence"] == "Apache-2.0"


def test_the_markdown_table_is_one(capsys):
    assert main(["list", "--markdown"]) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("|- ")


def test_a_pattern_without_a_match_offers_the_nearest(capsys):
    assert main(["list", "hatt-s-x2"]) == 2
    assert "no model matches 'hatt-s-x2'. Did you mean 'hat-s-x2'" in capsys.readouterr().err


def test_figures_come_from_the_index(capsys, monkeypatch):
    row = {"figures": {"PSNR-Y, crop 2, uint8": 33.5, "noise": 1}, "sha256": "0", "source": "here"}
    monkeypatch.setattr(shipped, "index", lambda: {"hat-tiny-x2": row})
    assert main(["list", "hat-tiny-x2"]) == 0
    said, _, _, line = capsys.readouterr().out.splitlines()
    assert said == "measured: PSNR-Y, crop = scale, uint8"
    assert line.split()[-1] == "33.5"
    assert main(["info", "hat-tiny-x2"]) == 0
    assert "figures     PSNR-Y, crop 2, uint8: 33.5\n            noise: 1\n" in capsys.readouterr().out
    assert main(["info", "hat-tiny-x2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == row["figures"]


def test_figures_by_different_protocols_are_told_apart(capsys, monkeypatch):
    rows = {"hat-s-x2": "PSNR-Y, crop 2", "hat-s-x3": "PSNR-Y, crop 3", "hat-s-x4": "PSNR-Y, crop 0"}
    monkeypatch.setattr(shipped, "index", lambda: {name: {"paper": {how: "30 dB"}} for name, how in rows.items()})
    assert main(["list", "hat-s*"]) == 0
    said, _, _, *lines = capsys.readouterr().out.splitlines()
    assert said == "paper: [a] PSNR-Y, crop = scale, [b] PSNR-Y, crop 0"
    assert [line[-3:] for line in lines] == ["[a]", "[a]", "[b]"]


def test_info_of_a_name_needs_no_weights(capsys):
    assert main(["info", "hat-l-x4"]) == 0
    out = capsys.readouterr().out
    assert "multiple    16" in out
    assert "float32, bfloat16" in out


def test_info_of_a_file_reads_its_architecture(tmp_path, capsys):
    torch.manual_seed(0)
    network = models.create({"family": "plain-conv", "embed_dim": 8, "depth": 1, "num_feat": 8, "upscale": 2})
    path = tmp_path / "mine.safetensors"
    write_weights(path, network)
    assert main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "plain-conv"
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["config"]["embed_dim"] == 8


@pytest.mark.parametrize("name", ["hat-tny-x2", "nowhere.pth"])
def test_info_of_something_unknown_is_one_sentence(name, capsys):
    assert main(["info", name]) == 2
    err = capsys.readouterr().err
    assert f"'{name}' is neither a model nor a file" in err
    assert err.count("\n") == 1
