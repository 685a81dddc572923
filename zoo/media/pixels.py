"""What a pixel array means: Pillow images of any mode to float planes and back, at 8 and 16 bits."""

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageFile

from zoo.errors import UserError

_ORIENTATION = 0x0112  # the EXIF tag
_COLOUR16 = {f"{mode};16{order}" for mode in ("RGB", "RGBA", "RGBX") for order in "BLN"} | {"LA;16B"}
# Pillow keeps the high bytes of 16-bit colour; reading the same bytes in the other order gives the low ones
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


@dataclass
class Picture:
    """One decoded image.

    Attributes:
        pixels: float32 in [0, 1], (h, w, c) with c = 1 (gray) or 3 (RGB).
        alpha: opacity, float32 in [0, 1], (h, w); None when the file has none.
        bits: 8 or 16, the depth of the file; write_image keeps it.
        info: "icc_profile" (bytes) and "text" (a PNG's text chunks but EXIF and XMP), where present.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8
    info: dict[str, Any] = field(default_factory=dict)


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Clamp to [0, 1], times 255, round half to even: the one way from float to 8 bits. uint8 passes unchanged."""
    return array if array.dtype == np.uint8 else np.rint(np.clip(array, 0, 1) * np.float32(255)).astype(np.uint8)


def to_uint16(array: np.ndarray) -> np.ndarray:
    """Clamp to [0, 1], times 65535, round half to even."""
    return np.rint(np.clip(array, 0, 1) * np.float64(65535)).astype(np.uint16)


def to_unit(array: np.ndarray) -> np.ndarray:
    """Any image array (h, w) or (h, w, c) as float32 (h, w, c): integers are divided by their largest value."""
    array = np.asarray(array)
    if array.ndim not in (2, 3):
        raise ValueError(f"to_unit: array must be (h, w) or (h, w, c), got {array.shape}")
    array = array if array.ndim == 3 else array[..., None]
    if array.dtype in (np.uint8, np.uint16):
        return array / np.float32(np.iinfo(array.dtype).max)
    if array.dtype.kind not in "fb":
        raise ValueError(f"to_unit: dtype must be float, uint8, uint16 or bool, got {array.dtype}")
    return array.astype(np.float32)


def from_pil(image: Image.Image) -> Picture:
    """A Pillow image of any mode as a Picture, turned upright by its EXIF orientation."""
    return decode(image)


def to_pil(picture: Picture) -> Image.Image:
    """A Picture as L, LA, RGB or RGBA of 8 bits; gray of 16 bits without alpha stays at 16 (I;16)."""
    planes = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    deep = picture.bits == 16 and planes.shape[2] == 1
    planes = to_uint16(planes) if deep else to_uint8(planes)
    image = Image.fromarray(planes[..., 0] if planes.shape[2] == 1 else planes)
    if "icc_profile" in picture.info:
        image.info["icc_profile"] = picture.info["icc_profile"]
    return image


def decode(image: Image.Image, reopen: Callable[[], ImageFile.ImageFile] | None = None) -> Picture:
    """Read the pixels of an opened Pillow image.

    Args:
        image: opened, not yet loaded if its file holds 16-bit colour.
        reopen: opens the same file once more; without it 16-bit colour is cut to 8 bits.
    """
    raw = _raw_mode(image)
    deep = None
    if reopen and isinstance(image, ImageFile.ImageFile) and raw in _COLOUR16:
        deep = _read_16_bit_colour(image, raw, reopen)
    image.load()
    info, mode = _kept(image), image.mode
    if deep is not None:
        values = deep
    elif mode == "F" or mode.startswith("I"):
        values = _wide(image)
    else:
        values = np.asarray(_plain(image))
    values = values if values.ndim == 3 else values[..., None]
    colours = 1 if values.shape[2] < 3 else 3
    unit = to_unit(values)
    alpha = unit[..., colours] if values.shape[2] > colours else None
    key = image.info.get("transparency")  # of gray and RGB: the one colour that is see-through
    if alpha is None and key is not None and mode not in ("P", "F"):
        key = np.array(key) * {"L;2": 85, "L;4": 17}.get(raw, 1)  # Pillow spreads such values, not the key
        alpha = (values != key).any(axis=2).astype(np.float32)
    turn = image.getexif().get(_ORIENTATION, 1)
    pixels = np.ascontiguousarray(_upright(unit[..., :colours], turn))
    alpha = None if alpha is None else np.ascontiguousarray(_upright(alpha, turn))
    return Picture(pixels, alpha, 8 if values.dtype == np.uint8 else 16, info)


def _raw_mode(image: Image.Image) -> str:
    """How Pillow is about to read the file's bytes, such as "RGB;16B"; "" when nothing is left to read."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _read_as(image: ImageFile.ImageFile, raw: str) -> np.ndarray:
    """Load the file's bytes as another raw mode. uint16 (h, w, c)."""
    for i, tile in enumerate(image.tile):
        *place, arguments = tile
        arguments = (raw, *arguments[1:]) if isinstance(arguments, tuple) else raw
        image.tile[i] = tuple.__new__(type(tile), (*place, arguments))  # plain tuples in Pillow before 11, then named
    return np.asarray(image).astype(np.uint16)


def _read_16_bit_colour(image: ImageFile.ImageFile, raw: str, reopen: Callable[[], ImageFile.ImageFile]) -> np.ndarray:
    """High and low bytes from two decodings. uint16 (h, w, c)."""
    if raw == "LA;16B":  # four bytes a pixel, so one decoding as RGBA delivers them all
        four = _read_as(image, "RGBA")
        return four[..., 0::2] * 256 + four[..., 1::2]
    low = _read_as(reopen(), raw[:-1] + _OTHER_ORDER[raw[-1]])
    return np.asarray(image).astype(np.uint16) * 256 + low


def _wide(image: Image.Image) -> np.ndarray:
    """Gray of more than 8 bits: uint16, or float32 as it is. (h, w)."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= top):
        raise UserError(f"gray values of mode {image.mode} must lie between 0 and {top}; scale them and save again")
    return values if image.mode == "F" else values.astype(np.uint16)


def _plain(image: Image.Image) -> Image.Image:
    """Any 8-bit mode as L, LA, RGB or RGBA."""
    if image.mode in ("L", "LA", "RGB", "RGBA"):
        return image
    if image.mode == "CMYK":
        return _from_cmyk(image)
    see_through = image.mode in ("PA", "RGBa") or (image.mode == "P" and "transparency" in image.info)
    return image.convert({"1": "L", "La": "LA"}.get(image.mode, "RGBA" if see_through else "RGB"))


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Print colours to sRGB by the profile inside the file, or by Pillow's plain formula when it has no usable one."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted if converted is not None else image.convert("RGB")
    except (KeyError, OSError, ImageCms.PyCMSError):
        return image.convert("RGB")


def _kept(image: Image.Image) -> dict[str, Any]:
    """What goes on to the output. EXIF and XMP stay behind: they hold places and persons, and the old orientation."""
    info: dict[str, Any] = {}
    if image.info.get("icc_profile") and image.mode != "CMYK":
        info["icc_profile"] = image.info["icc_profile"]
    text = {k: str(v) for k, v in getattr(image, "text", {}).items() if not k.startswith(("Raw profile", "XML:"))}
    return info | ({"text": text} if text else {})


def _upright(plane: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1 to 8) on the first two axes."""
    if orientation in (5, 6, 7, 8):
        plane = plane.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        plane = plane[::-1]
    if orientation in (2, 3, 6, 7):
        plane = plane[:, ::-1]
    return plane
