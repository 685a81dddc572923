import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.data import photos as module
from zoo.data.photos import SPLITS, files, load, photos
from zoo.errors import UserError
from zoo.shipped import folder


def test_splits_are_fixed_and_disjoint():
    assert [photo.name for photo in load("validation")] == ["rocket", "chelsea", "camera", "coins", "gravel"]
    assert len(load("train")) == 10
    assert not set(SPLITS["train"]) & set(SPLITS["validation"])
    shapes = {photo.name: photo.pixels.shape for photo in load("validation")}
    assert shapes["rocket"] == (427, 640, 3)
    assert shapes["camera"] == (512, 512, 1)
    assert {name for name, shape in shapes.items() if shape[2] == 1} == {"camera", "coins", "gravel"}


def test_pixels_are_those_of_scikit_image():
    from skimage import data

    for name in ("chelsea", "astronaut", "coins"):
        photo = next(p for split in ("train", "validation") for p in load(split) if p.name == name)
        expected = getattr(data, name)()
        np.testing.assert_array_equal(photo.pixels.squeeze(), expected)
    name, pixels = photos("validation")[1]
    assert name == "chelsea"
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels * 255, data.chelsea(), atol=1e-4)


def test_demo_photo_ships_with_zoo_and_equals_the_original():
    [demo] = load("demo")
    np.testing.assert_array_equal(demo.pixels, load("validation")[1].pixels)
    path = folder("checkpoints") / "demo" / "chelsea.png"
    assert path.stat().st_size < 250_000
    with Image.open(path) as image:
        assert not image.info  # no camera data


def test_missing_extra_is_one_sentence_with_the_remedy(monkeypatch):
    load.cache_clear()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'zoo\[photos\]'"):
        load("train")
    assert [photo.name for photo in load("demo")] == ["chelsea"]  # needs no extra


def test_incomplete_extra_and_unknown_split_are_named(monkeypatch):
    monkeypatch.setitem(SPLITS, "train", ("nowhere.png",))
    with pytest.raises(FileNotFoundError, match=r"lacks nowhere.png; install scikit-image"):
        files("train")
    with pytest.raises(UserError, match=r"no split 'trian'.*Did you mean 'train'"):
        photos("trian")


def test_reading_photos_imports_neither_scikit_image_nor_lightning():
    code = (
        "import sys; from zoo.data.photos import load; load('train'); import zoo.data.crops, zoo.metrics.psnr_ssim; "
        "print(sorted({'skimage', 'pooch', 'lightning', 'torchmetrics', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
