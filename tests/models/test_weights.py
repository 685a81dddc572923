import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import zoo.models
from zoo.errors import UserError
from zoo.models.weights import read_weights, tensor_hash, unwrap, write_weights

SMALL = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4}


class Hostile:
    def __reduce__(self):
        return os.mkdir, (str(Hostile.trace),)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"params_ema": state, "params": {}},
        lambda state: {"params": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {"model": {"net": state}},
        lambda state: {"anything": state},
        lambda state: {"state_dict": {f"network.{k}": v for k, v in state.items()}, "best": np.float64(38.6)},
        lambda state: {"iteration": torch.tensor(3), "state_dict": state},
        lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    ],
)
def test_every_wrapping_of_the_field_loads(wrap, tmp_path):
    net = zoo.models.create(SMALL)
    torch.save(wrap(net.state_dict()), tmp_path / "w.pth")
    again = zoo.models.load(tmp_path / "w.pth")
    assert again.config["embed_dim"] == 4
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())


def test_scalars_that_numpy_1_wrote_are_read(tmp_path):
    written = io.BytesIO()
    torch.save({"params": {"a": torch.zeros(2)}, "best": np.float64(38.6)}, written)
    with zipfile.ZipFile(written) as new, zipfile.ZipFile(tmp_path / "w.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            renamed = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, renamed if name.endswith("data.pkl") else content)
            assert renamed != content or not name.endswith("data.pkl")
    assert list(read_weights(tmp_path / "w.pth")[0]) == ["a"]


def test_a_written_file_describes_itself_and_keeps_what_weights_cannot_tell(tmp_path):
    net = zoo.models.create({"variant": "hat-tiny-x2", "img_range": 255.0})
    path = write_weights(tmp_path / "w.safetensors", net, dtype=torch.float16)
    state, header = read_weights(path)
    assert header["arch"] == "hat"
    assert header["sha"] == tensor_hash(load_file(path))
    assert state["conv_first.weight"].dtype == torch.float16
    assert state["relative_position_index_SA"].dtype == torch.int64
    again = zoo.models.load(path)
    assert again.config == net.config
    assert again.conv_first.weight.dtype == torch.float32


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    net = zoo.models.create(SMALL)
    (tmp_path / "w.partial").write_bytes(b"somebody's own file")
    path = write_weights(tmp_path / "w.safetensors", net)
    assert (tmp_path / "w.partial").read_bytes() == b"somebody's own file"
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="--force"):
        write_weights(path, zoo.models.create(SMALL))
    assert path.read_bytes() == before
    write_weights(path, zoo.models.create(SMALL), force=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("name", ["weights", "weights.bin", "1234abcd"])
def test_safetensors_are_known_by_their_content(name, tmp_path):
    net = zoo.models.create(SMALL)
    written = write_weights(tmp_path / "w.safetensors", net)
    path = written.rename(tmp_path / name)
    assert zoo.models.load(path).config == net.config
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=f"{name} is damaged or no safetensors file"):
        zoo.models.load(path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_code_is_never_executed(protocol, tmp_path):
    Hostile.trace = tmp_path / "executed"
    torch.save({"params": Hostile()}, tmp_path / "zip.pth", pickle_protocol=protocol)
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"params": Hostile()}, protocol))
    for name in ("zip.pth", "raw.pth"):
        with pytest.raises(UserError, match=r"was not opened|damaged"):
            read_weights(tmp_path / name)
    assert not Hostile.trace.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02.", b"PK\x03\x04broken", b"\xff" * 64])
def test_damaged_files_say_so(suffix, content, tmp_path):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"w\.(pth|safetensors) (is damaged|holds Python objects)"):
        zoo.models.load(path)


def test_a_picture_is_not_called_code(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "w.pth", "PNG")
    with pytest.raises(UserError, match="damaged or no weight file"):
        read_weights(tmp_path / "w.pth")


def test_truncated_files_say_so(tmp_path):
    torch.save(zoo.models.create(SMALL).state_dict(), tmp_path / "w.pth")
    save_file(zoo.models.create(SMALL).state_dict(), tmp_path / "w.safetensors")
    for path in (tmp_path / "w.pth", tmp_path / "w.safetensors"):
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(UserError, match="damaged"):
            zoo.models.load(path)


def test_a_file_without_tensors_is_refused():
    for stored in ({}, {"a": 1, "b": 2}, [1, 2], {"state_dict": {}}):
        with pytest.raises(UserError, match="holds no tensors"):
            unwrap(stored)
