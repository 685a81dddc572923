"""Damaged and odd files by the hundred: each gets its sentence, no code runs, the rest of a folder is finished."""

import io
import os
import pickle
import re

import av
import numpy as np
import pytest
import torch
from PIL import Image

from zoo import models
from zoo.cli import main
from zoo.errors import UserError
from zoo.models.weights import write_weights

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (20, 24, 3), np.uint8))
KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "tiff": "TIFF", "bmp": "BMP", "gif": "GIF"}
NETWORKS = {
    "plain-conv": {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2},
    "hat": {"variant": "hat-tiny-x2", "depths": [1], "num_heads": [2], "embed_dim": 16, "squeeze_factor": 16},
    "craft": {"variant": "craft-tiny-x2", "embed_dim": 32, "split_size_0": 4, "split_size_1": 8},
    "histoformer": {"variant": "histoformer-tiny", "num_blocks": [1, 1, 1, 1]},
}


def damages(data):
    """A file spoilt in every way that disks, networks and people spoil files."""
    data, n = bytearray(data), len(data)
    yield "first half", data[: n // 2]
    yield "without its end", data[: n - n // 10 - 12]
    yield "without its start", data[16:]
    yield "zeros from the middle on", data[: n // 2] + bytes(n - n // 2)
    yield "zeros", bytes(n)
    yield "text first", b"HTTP/1.1 200 OK\r\n\r\n" + data
    yield "page of a login", b"<!DOCTYPE html><title>Sign in</title>" * 9
    yield "pointer of git lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for seed in range(4):
        some, at = bytearray(data), np.random.default_rng(seed).integers(0, n, 12)
        for place in at:
            some[place] ^= 0xFF
        yield f"bytes turned over, {seed}", some


def odd_pictures(folder):
    """Names of pictures that are unusual but whole, and of what cannot be one."""
    whole = {
        "one pixel.png": PHOTO.resize((1, 1)),
        "one row.png": PHOTO.resize((40, 1)),
        "two colours.png": PHOTO.convert("1"),
        "palette.png": PHOTO.convert("P"),
        "gray and alpha.png": PHOTO.convert("LA"),
        "deep.tiff": Image.fromarray(RNG.integers(0, 65536, (6, 7), np.uint16)),
        "größe 🦓.png": PHOTO,
        "-r.png": PHOTO,
        "a'b\"c $(date).png": PHOTO,
        "two.dots.png": PHOTO,
        "UPPER.PNG": PHOTO,
    }
    for name, image in whole.items():
        image.save(folder / name)
    PHOTO.save(folder / "really a jpeg.png", "JPEG")
    PHOTO.save(folder / "broken profile.jpg", icc_profile=b"no profile at all")
    PHOTO.save(folder / "broken exif.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    (folder / "inside").mkdir()
    PHOTO.save(folder / "inside" / "deeper.png")
    (folder / "link.png").symlink_to(folder / "inside" / "deeper.png")
    PHOTO.convert("CMYK").save(folder / "cmyk.jpg")
    pictures = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if not path.is_dir()]
    (folder / "to nowhere.png").symlink_to(folder / "gone.png")
    huge = b"\x28\0\0\0" + b"\xff\xff\xff\x0f" * 2 + b"\1\0\x18\0"
    (folder / "huge.bmp").write_bytes(b"BM" + bytes(12) + huge + bytes(24))
    (folder / "words.png").write_text("hello")
    (folder / "words.mp4").write_text("hello")
    (folder / "empty.mkv").touch()
    with av.open(folder / "sound only.mp4", "w") as file:
        stream = file.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    nothing = ["to nowhere.png", "huge.bmp", "words.png", "sound only.mp4", "words.mp4", "empty.mkv", "pipe.png"]
    return pictures, nothing


def test_a_folder_of_damaged_pictures_is_finished(tmp_path, capsys):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pictures, nothing = odd_pictures(source)
    for suffix, kind in KINDS.items():
        stream = io.BytesIO()
        PHOTO.save(stream, kind)
        for name, content in damages(stream.getvalue()):
            (source / f"{name}.{suffix}").write_bytes(content)
            if not name.startswith(("zeros from", "bytes")):  # whose pictures may still be read
                nothing.append(f"{name}.{suffix}")
    given = {p.relative_to(source).as_posix() for p in source.rglob("*.*") if not p.is_dir()}
    weights = write_weights(tmp_path / "w.safetensors", models.create(NETWORKS["plain-conv"]))
    code = main(["restore", str(source), str(out), "--model", str(weights)])
    printed = capsys.readouterr()
    told = printed.err.splitlines()[1:]  # the first is about the weights
    named = [line.removeprefix(f"zoo: {source}/").split(": ")[0] for line in told]
    assert code == 2
    assert len(given) > 90
    assert len(set(named)) == len(named) >= len(nothing) > 45
    assert set(nothing) <= set(named) <= given - set(pictures)
    assert all(re.search(r"; (get|check|name|give|cut) ", line) for line in told)
    finished = len(given) - len(named)
    assert len([p for p in out.rglob("*.*") if p.is_file()]) == finished >= len(pictures)
    assert f"{finished} of {len(given)} files restored, {len(named)} could not be restored" in printed.out


class Hostile:
    """What an unpickler that trusts its file would run."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["TRACE"],))


def odd_states(state):
    """State dicts that are no weights of the network they look like."""
    keys = list(state)
    some = [key for key in keys if state[key].ndim == 4 and state[key].is_floating_point()][-1]
    yield "last gone", {key: state[key] for key in keys[:-1]}
    yield "half gone", {key: state[key] for key in keys[: len(keys) // 2]}
    yield "one more", {**state, "extra.weight": torch.ones(3)}
    yield "renamed", {key.replace("weight", "w"): value for key, value in state.items()}
    yield "unknown prefix", {f"what.{key}": value for key, value in state.items()}
    yield "prefix here and there", {("module." * (n % 2)) + key: v for n, (key, v) in enumerate(state.items())}
    yield "another shape", {**state, some: torch.randn(5, 7, 3, 3)}
    yield "numbers for tensors", {key: torch.tensor(1.0) for key in keys}
    yield "no elements", {key: value[:0] if value.ndim else value for key, value in state.items()}
    yield "flat", {key: value.flatten() for key, value in state.items()}
    yield "turned", {key: value.transpose(0, -1) if value.ndim > 1 else value for key, value in state.items()}
    yield "not a number", {**state, some: torch.full_like(state[some], torch.nan)}
    yield "without end", {**state, some: torch.full_like(state[some], torch.inf)}
    yield "whole numbers", {key: value.int() for key, value in state.items()}
    yield "truths", {key: value.bool() for key, value in state.items()}
    yield "complex", {key: value.to(torch.complex64) for key, value in state.items()}
    yield "sparse", {**state, some: state[some].to_sparse()}
    yield "meta", {key: value.to("meta") for key, value in state.items()}
    yield "a number among them", {**state, some: 3}
    yield "None among them", {**state, some: None}
    yield "of numpy", {key: value.numpy() for key, value in state.items()}
    yield "numbered", dict(enumerate(state.values()))
    yield "one pair as name", {**state, (1, 2): torch.ones(1)}
    yield "in a list", list(state.values())


@pytest.mark.parametrize("family", NETWORKS)
def test_no_odd_state_dict_is_loaded(family, tmp_path):
    state = models.create(NETWORKS[family]).state_dict()
    for name, odd in odd_states(state):
        path = tmp_path / f"{name}.pth"
        torch.save({"params": odd}, path)
        for source in (path, {"params": odd}):
            with pytest.raises(UserError, match=r"; (fetch|give|see|ask) ") as caught:
                models.load(source)
            assert "\n" not in str(caught.value), name
            assert isinstance(source, dict) or str(path) in str(caught.value)


def test_no_damaged_weight_file_is_loaded_and_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACE", str(tmp_path / "ran"))
    network = models.create(NETWORKS["plain-conv"])
    state = network.state_dict()
    zipped, pickled = io.BytesIO(), io.BytesIO()
    torch.save({"params": state}, zipped)
    torch.save({"params": state}, pickled, _use_new_zipfile_serialization=False)
    whole = write_weights(tmp_path / "whole.safetensors", network)
    files = {"safetensors": whole.read_bytes(), "pth": zipped.getvalue(), "pt": pickled.getvalue()}
    for suffix, data in files.items():
        for name, content in damages(data):
            if suffix == "pt" and name.startswith("bytes"):  # without a checksum: may be just other numbers
                continue
            path = tmp_path / f"{name}.{suffix}"
            path.write_bytes(content)
            with pytest.raises(UserError, match=r"; (fetch|ask|give) ") as caught:
                models.load(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
    hostile = Hostile()
    for n, odd in enumerate([hostile, {"params": hostile}, {**state, "a": hostile}, {"zoo": hostile}, [hostile]]):
        torch.save(odd, tmp_path / f"zip{n}.pth")
        (tmp_path / f"raw{n}.pth").write_bytes(pickle.dumps(odd))
        for path in (tmp_path / f"zip{n}.pth", tmp_path / f"raw{n}.pth"):
            with pytest.raises(UserError, match=r"objects that could run code|damaged"):
                models.load(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(hostile))
    assert (tmp_path / "ran").exists()  # it would have shown
