import hashlib
import importlib.util
import json
import sys

import pytest

from zoo import shipped
from zoo.cli import doctor, main


def test_it_reports_versions_devices_and_dtypes(capsys):
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"].startswith("2.")
    assert "float32, bfloat16" in found["devices"]["cpu"]
    assert found["free"]["disk"].split()[1] == "GiB"
    assert code == (1 if found["problems"] else 0)


def test_it_prints_a_table(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert "versions  torch" in out
    assert "tracking" in out


def test_damaged_and_missing_weights_are_problems(tmp_path, monkeypatch):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(b"weights")
    bad.write_bytes(b"weighs")
    sha = hashlib.sha256(b"weights").hexdigest()
    files = {"good": good, "bad": bad, "lost": tmp_path / "lost", "official": None}
    monkeypatch.setattr(shipped, "index", lambda: {name: {"sha256": sha} for name in files})
    monkeypatch.setattr(shipped, "weight_file", files.get)
    problems = []
    assert doctor._weights(problems) == {"good": "sha256 fits"}
    assert ["weights of bad are damaged" in problems[0], "weights of lost are missing" in problems[1]] == [True, True]


def test_a_broken_torchvision_is_named_with_its_cure(tmp_path, monkeypatch):
    if importlib.util.find_spec("torchvision"):
        pytest.skip("this environment has a torchvision of its own")
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    problems = []
    assert doctor._devices(problems)["cpu"]
    (problem,) = problems
    assert "operator torchvision::nms does not exist" in problem
    assert problem.endswith("pip uninstall torchvision")
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"WANDB_MODE": "offline"}, "W&B offline"),
        ({"WANDB_API_KEY": "0" * 40}, "W&B online"),
        ({}, "no key"),
    ],
)
def test_the_state_of_tracking_is_told_without_asking(settings, said, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert said in doctor._tracking()
