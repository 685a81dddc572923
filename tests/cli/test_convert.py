import json

import pytest
import torch
from safetensors import safe_open

from zoo import models
from zoo.cli import main

TINY = {"family": "hat", "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4, "compress_ratio": 2}
TINY |= {"squeeze_factor": 2, "num_feat": 4, "upscale": 2}


@pytest.fixture
def old(tmp_path):
    network = models.create(TINY)
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save({"params": {}, "params_ema": state}, tmp_path / "net_g.pth")
    return network, tmp_path / "net_g.pth"


def test_an_official_file_becomes_one_that_describes_itself(old, tmp_path, capsys):
    network, file = old
    new = tmp_path / "new.safetensors"
    assert main(["convert", str(file), str(new), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["tensors"], told["bytes"]) == ("hat", len(network.state_dict()), new.stat().st_size)
    with safe_open(new, "pt") as stored:
        assert json.loads(stored.metadata()["zoo"])["arch"] == "hat"
    again = models.load(new)
    assert again.config == models.load(file).config
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_half_precision_halves_the_file(old, tmp_path, capsys):
    _, file = old
    sizes = []
    for dtype in ("float32", "fp16"):
        assert main(["convert", str(file), str(tmp_path / f"{dtype}.safetensors"), "--dtype", dtype]) == 0
        with safe_open(tmp_path / f"{dtype}.safetensors", "pt") as stored:
            sizes.append(stored.get_tensor("conv_first.weight").element_size())
    assert sizes == [4, 2]
    assert "tensors" in capsys.readouterr().out


def test_nothing_is_overwritten_and_no_code_runs(old, tmp_path, capsys):
    _, file = old
    new = tmp_path / "new.safetensors"
    new.write_text("precious")
    assert main(["convert", str(file), str(new)]) == 2
    assert "exists; choose another name or give --force" in capsys.readouterr().err
    assert new.read_text() == "precious"
    assert main(["convert", str(file), str(tmp_path / "new.pth")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
    trap = tmp_path / "trap.pth"

    class Runs:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    torch.save({"params": Runs()}, trap)
    assert main(["convert", str(trap), str(tmp_path / "b.safetensors")]) == 2
    assert "could run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "b.safetensors").exists()
