"""`zoo sample`: pictures, a grid, and what they were made with."""

import json

import pytest
from PIL import Image

from tests.pipelines.tiny import stable_diffusion
from zoo.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    stable_diffusion().save_pretrained(place)
    return place


def sample(folder, tmp_path, *words, prompt="a red circle"):
    words = ["--prompt", prompt, "--pipeline", str(folder), "--steps", "2", "--out", str(tmp_path / "out"), *words]
    return main(["sample", *words])


def test_single_files_and_a_grid_with_their_facts(folder, tmp_path, capsys):
    assert sample(folder, tmp_path, "--num", "2", "--seed", "5", "--guidance", "3", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(tmp_path / "out" / "0001")
    assert [(r["prompt"], r["seed"]) for r in said["done"]] == [("a red circle", 5), ("a red circle", 6)]
    text = Image.open(said["done"][1]["file"]).text
    assert text["zoo:prompt"] == "a red circle"
    assert (text["zoo:seed"], text["zoo:steps"], text["zoo:guidance"]) == ("6", "2", "3")
    assert text["zoo:weights"] == f"sha256 {said['weights']}"
    grid = Image.open(tmp_path / "out" / "0001" / "grid.png")
    assert grid.width > 2 * 64


def test_nothing_is_overwritten(folder, tmp_path):
    for number in (1, 2):
        assert sample(folder, tmp_path, "--num", "1") == 0
        assert (tmp_path / "out" / f"000{number}" / "grid.png").is_file()


def test_several_prompts_and_another_size(folder, tmp_path, capsys):
    assert sample(folder, tmp_path, "--prompt", "a star", "--num", "1", "--size", "64x32", "--json") == 0
    files = [record["file"] for record in json.loads(capsys.readouterr().out)["done"]]
    assert [Image.open(file).size for file in files] == [(64, 32)] * 2


def test_a_prompt_that_is_too_long_is_said_and_made(folder, tmp_path, capsys):
    assert sample(folder, tmp_path, "--num", "1", prompt="a" * 10000) == 0
    said = capsys.readouterr().err
    assert "only the first 24 count" in said
    assert len(said) < 500


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--scheduler", "Eulr"], "scheduler 'Eulr' is unknown"),
        (["--pipeline", "/"], "no model_index.json"),
        (["--pipeline", "someone/nothing"], "neither a folder here nor to be had from the hub"),
        (["--size", "65"], "divisible by 8"),
        (["--size", "big"], "must be pixels such as 64 or 96x64"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--guidance", "nan"], "guidance must be a number"),
        (["--num", "0"], "--num must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence_and_makes_nothing(folder, tmp_path, capsys, words, said):
    assert sample(folder, tmp_path, *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert err.count("\n") == 0
    assert not (tmp_path / "out").exists()
