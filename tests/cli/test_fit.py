import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo import models
from zoo.cli import main

SMALL = Path(__file__).parents[1] / "recipe" / "small.yaml"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The words of `zoo fit` on one tiny picture, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_RUN", raising=False)
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "a.png")
    return ["fit", str(SMALL), f"data.init_args.source={photos}", "--quiet"]


def report(capsys):
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_a_run_is_numbered_complete_and_told(words, capsys):
    assert main([*words, "--json"]) == 0
    found, _ = report(capsys)
    assert found["run"] == "runs/0001"
    assert (found["state"], found["step"]) == ("finished", 2)
    run = Path("runs/0001")
    text = (run / "recipe.yaml").read_text()
    assert f"#   {words[2]}" in text
    assert text.endswith(SMALL.read_text())
    assert models.load(run / "weights.safetensors").upscale == 2
    assert main([*words, "trainer.max_steps=1"]) == 0
    out = capsys.readouterr().out
    assert "runs/0002 (finished, 1 steps)" in out
    assert "zoo restore IN OUT --model runs/0002" in out


def test_every_score_is_printed_with_its_protocol(words, capsys):
    photos = words[2].partition("=")[2]
    validation = f"data.init_args.validation={{mine: {{source: {photos}}}}}"
    words += [validation, "trainer.val_check_interval=2", "model.init_args.crop_border=3"]
    for resume in ([], ["--resume=runs/0001"]):
        assert main([*words, *resume]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("val/")]
        assert [line.split()[0] for line in lines] == ["val/mine/psnr", "val/mine/psnr_bicubic", "val/psnr"]
        assert all(line.endswith(" (PSNR-RGB, crop 3, uint8)") for line in lines)
    assert main([*words, "--json", "--resume=runs/0001"]) == 0
    assert report(capsys)[0]["protocol"] == "PSNR-RGB, crop 3, uint8"


def test_a_finished_run_says_so_and_goes_on_when_more_steps_are_asked_for(words, capsys):
    assert main(words) == 0
    weights = Path("runs/0001/weights.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*words[:-1], "--resume=runs/0001"]) == 0  # without --quiet
    assert "run runs/0001 is finished after 2 steps; nothing is left to do" in capsys.readouterr().err
    assert Path("runs/0001/weights.safetensors").read_bytes() == weights
    assert main([*words, "trainer.max_steps=3", "--resume=runs/0001"]) == 0
    assert json.loads(Path("runs/0001/status.json").read_text())["step"] == 3
    assert "max_steps: 3" in Path("runs/0001/checkpoints/config.yaml").read_text()
    assert "max_steps: 2" in Path("runs/0001/checkpoints/config-until-2.yaml").read_text()
    assert not Path("runs/0002").exists()


def test_a_run_that_went_on_with_other_settings_is_found_by_them(words, capsys):
    assert main(words) == 0
    changed = [*words, "trainer.max_steps=4", "model.init_args.crop_border=1"]
    assert main([*changed, "model.init_args.crop_border=-1", "--resume=runs/0001"]) == 2
    assert "max_steps: 2" in Path("runs/0001/checkpoints/config.yaml").read_text(), "they cannot be built"
    assert main([*changed, "--resume=runs/0001"]) == 0
    status = Path("runs/0001/status.json")
    status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "interrupted"}))
    capsys.readouterr()
    assert main([*changed, "--resume", "--json"]) == 0
    assert report(capsys)[0]["run"] == "runs/0001"


def test_without_an_unfinished_run_resume_starts_anew_and_says_so(words, capsys):
    assert main([*words, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "runs/0001 (finished, 2 steps)" in out
    assert err == "no unfinished run of this recipe below runs; a new one starts\n"


def test_a_recipe_that_cannot_be_built_leaves_no_run_behind(words, capsys):
    assert main([*words, "model.init_args.network=hat-tny-x2"]) == 2
    assert "Did you mean 'hat-tiny-x2'" in capsys.readouterr().err
    assert not list(Path("runs").glob("*"))


def test_data_that_are_not_there_are_one_sentence(words, capsys):
    assert main([*words, "data.init_args.source=/nowhere/at/all"]) == 2
    err = capsys.readouterr().err
    assert "/nowhere/at/all" in err
    assert err.count("\n") == 1
    assert not list(Path("runs").glob("*"))


def test_settings_that_lightning_refuses_are_one_sentence(capsys):
    settings = ["trainer.gradient_clip_val=0.1", "vars.start=hat-tiny-x4"]
    assert main(["check", "real-hat-gan", *settings]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "clipping is not supported" in last
    assert last.endswith("; correct the recipe")


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--resume=nothing"], "nothing has no status.json, so it is no run folder"),
        (["--device", "cuda:77"], "device cuda:77: torch sees"),
        (["--out", "photos/a.png"], "photos/a.png"),
        (["trainer.max_step=3"], "Trainer takes no 'max_step'. Did you mean 'max_steps'"),
        (["trainer.callbacks+=[os.system]"], "trainer.callbacks.1 may not name the class 'os.system'; --trust"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, extra, said, capsys):
    assert main([*words, *extra]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1


def test_device_dtype_and_seed_are_overrides():
    from zoo.cli.fit import add_arguments, overrides
    from zoo.cli.options import Parser

    parser = Parser("zoo fit", "trains")
    add_arguments(parser)
    args = parser.parse(["r", "a=1", "--device=cpu", "--dtype=bf16", "--seed=3"])
    expected = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.precision=bf16-mixed", "seed_everything=3"]
    assert overrides(args) == ["a=1", *expected]
    assert overrides(parser.parse(["r"])) == []


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="POSIX signals")
def test_a_terminated_run_exits_with_143_and_resumes_by_itself(words, capsys):
    endless = [*words, "trainer.max_steps=100000"]
    env = os.environ | {"PYTHONPATH": str(SMALL.parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "zoo", *endless], env=env, stdout=-1, stderr=-1, text=True)
    table = Path("runs/0001/metrics.csv")
    deadline = time.monotonic() + 120
    while not (table.is_file() and table.read_text().count("\n") > 3) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "go on with: zoo fit" in err
    assert "--resume=runs/0001" in err
    status = json.loads(Path("runs/0001/status.json").read_text())
    assert status["state"] == "interrupted"
    goal = status["step"] + 2
    assert main([*words, f"trainer.max_steps={goal}", "--resume=runs/0001", "--json"]) == 0
    found, _ = report(capsys)
    assert (found["state"], found["step"]) == ("finished", goal)


def test_a_run_of_a_feature_network_is_not_offered_to_restore(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZOO_RUN", raising=False)
    network = "model.init_args.network={family: plain-features, widths: [8], depths: [1], num_features: 4}"
    data = ["data.init_args.validation=0", "data.init_args.stages=[{until: null, batch_size: 1, patch_size: 32}]"]
    short = ["vars.steps=1", "model.init_args.schedule=null", "trainer.callbacks=null", "--quiet"]
    assert main(["fit", "shapes-features", network, *data, *short]) == 0
    assert "use it      zoo evaluate --pipeline shapes-sd --features runs/0001" in capsys.readouterr().out
