"""The real photos that scikit-image carries inside its wheel, split once and for all; nothing is ever downloaded.

Left out of both splits: drawings and renderings (chessboard, color, horse, logo, phantom), images without detail
(cell, clock_motion, moon and retina, which bicubic enlargement restores to 44 and 51 dB: a network learns them by
heart), and microaneurysms, a 102-pixel crop. The two motorcycle views are a stereo pair, so they stay on the same side.
rocket and hubble are JPEG files: their own compression is part of the target.

checkpoints/demo/chelsea.png is the same picture as scikit-image's chelsea.png: "Chelsea the cat", photographed by
Stefan van der Walt and given to everybody under CC0.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from zoo.errors import UserError, nearest
from zoo.shipped import folder

VALIDATION = ("rocket.jpg", "chelsea.png", "camera.png", "coins.png", "gravel.png")
TRAIN = (
    "astronaut.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "brick.png",
    "grass.png",
    "page.png",
    "text.png",
)
SPLITS = {"train": TRAIN, "validation": VALIDATION, "demo": ("chelsea.png",)}


@dataclass(frozen=True)
class Photo:
    """One decoded photo.

    Args:
        name: file name without its ending, such as "chelsea".
        pixels: uint8 (h, w, c), read-only; RGB, or one channel when the photo is gray.
    """

    name: str
    pixels: np.ndarray


def files(split: str) -> list[Path]:
    """Where the photos of `split` lie, in their fixed order.

    Args:
        split: "train", "validation", or "demo" (chelsea from zoo itself: needs no extra).

    Raises:
        UserError: no such split.
        FileNotFoundError: scikit-image is missing, or carries fewer photos than it should.
    """
    if split not in SPLITS:
        raise UserError(f"photos: no split {split!r}; it is one of {', '.join(SPLITS)}.{nearest(split, SPLITS)}")
    if split == "demo":
        top = folder("checkpoints") / "demo"
    else:
        # Looking the package up without importing it keeps its download code out of the process.
        spec = find_spec("skimage")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                f"photos: the {split} photos come with scikit-image, which is not installed; "
                "run pip install 'zoo[photos]' (in a checkout: pip install -e '.[photos]')"
            )
        top = Path(next(iter(spec.submodule_search_locations))) / "data"
    paths = [top / name for name in SPLITS[split]]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"photos: {top} lacks {', '.join(missing)}; install scikit-image from its wheel: "
            "pip install --force-reinstall 'scikit-image>=0.22'"
        )
    return paths


@cache
def load(split: str) -> tuple[Photo, ...]:
    """The photos of `split` as uint8, decoded once per process.

    Raises:
        UserError: no such split.
        FileNotFoundError: the files are not there; the message says what to install.
    """
    found = []
    for path in files(split):
        with Image.open(path) as image:
            pixels = np.array(image if image.mode == "L" else image.convert("RGB"))
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        pixels.setflags(write=False)
        found.append(Photo(path.stem, pixels))
    return tuple(found)


def photos(split: str = "train") -> list[tuple[str, np.ndarray]]:
    """Names and pixels of the photos of `split`, in their fixed order.

    Args:
        split: "train" (10 photos), "validation" (5, never trained on) or "demo" (chelsea).

    Returns:
        Pairs of name and float32 (h, w, c) in [0, 1]; c is 1 for a gray photo, else 3 (RGB).

    Raises:
        UserError: no such split.
        FileNotFoundError: the files are not there; the message says what to install.
    """
    return [(photo.name, photo.pixels.astype(np.float32) / 255) for photo in load(split)]
