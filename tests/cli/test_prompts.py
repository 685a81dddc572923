"""`zoo evaluate --pipeline`: a table whose every number says how it was made."""

import csv
import json

import pytest

from tests.pipelines.tiny import stable_diffusion
from zoo.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    stable_diffusion().save_pretrained(place)
    return place


def evaluate(folder, *words):
    few = ["--num", "3", "--steps", "1", "--features", "none"]
    return main(["evaluate", "--pipeline", str(folder), *few, *words])


def test_the_table_names_prompts_steps_and_guidance(folder, tmp_path, capsys):
    assert evaluate(folder, "--out", str(tmp_path / "out"), "--guidance", "2") == 0
    out = capsys.readouterr().out
    assert "3 unseen prompts, seed 0, 1 steps, guidance 2, DDIMScheduler" in out
    assert [line.split()[0] for line in out.splitlines()[2:7]] == ["real", "through", str(folder), "other", "noise"]
    rows = list(csv.DictReader((tmp_path / "out" / "prompts.csv").open()))
    assert rows[0]["all right"] == "1.0000"
    assert rows[-1]["all right"] == "0.0000"
    assert (tmp_path / "out" / "prompts.png").is_file()
    assert evaluate(folder, "--out", str(tmp_path / "out")) == 2, "never overwritten"


def test_json_carries_the_same(folder, capsys):
    assert evaluate(folder, "--json", "--things", "2") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"]["real pictures"]["2 things"] == 1
    assert "3 things" not in said["rows"]["noise"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--things", "7"], "things must be 1 to 3"),
        (["--num", "1"], "at least 2 prompts"),
        (["--model", "hat-tiny-x2"], "--model is for restorers"),
        (["--steps", "0"], "steps must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, words, said):
    assert evaluate(folder, *words) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert "\n" not in err
