"""Image files: decoding that refuses what it cannot do justice to, and encoding by the name of the output."""

import io
import os
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

from zoo.errors import UserError
from zoo.files import write_file

from .pixels import Picture, decode, to_pil, to_uint16, to_unit

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
MAX_PIXELS = 178_956_970  # where Pillow refuses too: beyond it a header is more often an attack than a photo
_READERS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_WRITERS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
_DESCRIPTION = 0x010E  # the EXIF tag


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode a PNG, JPEG, WebP, TIFF, BMP or still GIF: upright (EXIF), at full depth, alpha apart.

    Args:
        path: the file; its content decides the format, not its suffix.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: not an image, damaged, animated, empty or too large; the sentence says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, not an image; name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the path")
    if not path.is_file():  # opening a pipe waits for a writer that may never come
        raise UserError(f"{path}: a pipe or device, not an image; name a file")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of Pillow, about metadata that do not concern the pixels
            return decode(_header(path, file, max_pixels), lambda: _header(path, file, max_pixels))
    except UserError as error:
        raise error if str(error).startswith(str(path)) else UserError(f"{path}: {error}") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it; change its mode or owner") from error
    except MemoryError as error:
        raise UserError(f"{path}: too large for this machine's memory; cut it into pieces") from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        raise UserError(f"{path}: damaged or cut off ({error}); get the file again") from error


def write_image(
    path: str | Path,
    picture: Picture | np.ndarray,
    *,
    bits: int | None = None,
    metadata: dict[str, str] | None = None,
    force: bool = False,
) -> Path:
    """Encode by the suffix (PNG, JPEG 4:4:4 at quality 95, lossless WebP, TIFF) and put the whole file in place.

    Args:
        path: its folders are made; its suffix decides the format.
        picture: a Picture, or an array (h, w), (h, w, 1) or (h, w, 3): float in [0, 1], uint8 or uint16.
        bits: 8 or 16 (PNG only); None = the depth of the Picture, 8 for an array.
        metadata: names and texts: PNG text chunks, in other formats the EXIF description.
        force: replace a file that exists.

    Raises:
        FileExistsError: `path` exists and `force` is False.
        UserError: the format cannot hold the picture, or the file cannot be written; nothing partial is left.
    """
    path = Path(path)
    if not isinstance(picture, Picture):
        picture = Picture(to_unit(picture))
    check_output(path, bits=bits or picture.bits, alpha=picture.alpha is not None)
    picture = Picture(picture.pixels, picture.alpha, bits or picture.bits, picture.info)
    if picture.pixels.ndim != 3 or picture.pixels.shape[2] not in (1, 3) or 0 in picture.pixels.shape:
        raise ValueError(f"write_image: picture must be (h, w, 1) or (h, w, 3), got {picture.pixels.shape}")
    texts = {**picture.info.get("text", {}), **(metadata or {})}
    try:
        data = _png16(picture, texts) if picture.bits == 16 else _encoded(picture, path, texts)
    except (OSError, ValueError) as error:  # such as a side above 16383 for WebP
        height, width = picture.pixels.shape[:2]
        raise UserError(f"{path}: the format refuses {width}x{height} ({error}); name the output .png") from error
    return write_file(path, data, force=force)


def check_output(path: Path, *, bits: int = 8, alpha: bool = False) -> None:
    """Refuse a suffix that cannot hold such a picture, before any work is done.

    Raises:
        UserError: the ending is unknown, or its format has no transparency or no 16 bits.
    """
    kind = _WRITERS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: zoo writes {', '.join(_WRITERS)}; give the output one of these endings")
    if bits == 16 and kind != "PNG":
        raise UserError(f"{path}: only PNG keeps 16 bits here; name the output .png")
    if alpha and kind == "JPEG":
        raise UserError(f"{path}: JPEG has no transparency; name the output .png or .webp")


def list_images(
    folder: str | Path, recursive: bool = False, *, suffixes: tuple[str, ...] = IMAGE_SUFFIXES
) -> list[Path]:
    """The image files of a folder by suffix, in natural order (2 before 10); hidden files and folders are skipped.

    Args:
        folder: where to look.
        recursive: also in folders below it.
        suffixes: lower case, of what is wanted.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it is not a folder.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; check the path")
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give the folder that holds the images")
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        found += [Path(place, n) for n in names if n.lower().endswith(suffixes) and not n.startswith(".")]
    return sorted(found, key=lambda path: [_natural(part) for part in path.relative_to(folder).parts])


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sorting key that compares runs of digits as numbers."""
    return [(0, int(t), t) if t.isdecimal() else (1, 0, t.lower()) for t in re.findall(r"\d+|\D+", text)]


def _header(path: Path, file: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """Open without decoding. Formats outside _READERS never reach their decoders."""
    file.seek(0)
    head = file.read(16)
    file.seek(0)
    if not head:
        raise UserError(f"{path}: empty (0 bytes); get the file again")
    Image.init()
    for name in _READERS:
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(head) is True:
            image = factory(file, "")  # told a name, Pillow maps raw TIFF into memory and skews turned ones
            break
    else:
        raise UserError(
            f"{path}: not a PNG, JPEG, WebP, TIFF, BMP or GIF (it begins with {head!r}); "
            "check that it is an image, and convert it to PNG"
        )
    width, height = image.size
    if width * height == 0:
        raise UserError(f"{path}: has no pixels ({width}x{height}); get the file again")
    if width * height > max_pixels:
        raise UserError(
            f"{path}: {width}x{height} is above the limit of {max_pixels:,} pixels; cut it into pieces, "
            f"or raise the limit (--max-pixels {width * height}) if you trust the file"
        )
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)  # MPO: a phone's JPEG with a preview
    if frames > 1:
        raise UserError(
            f"{path}: holds {frames} frames where one still image is needed; write its frames into a folder "
            f"(ffmpeg -i {path.name} frames/%04d.png) and give that folder"
        )
    return image


def _encoded(picture: Picture, path: Path, texts: dict[str, str]) -> bytes:
    """8 bits by Pillow's encoders."""
    kind, image, stream = _WRITERS[path.suffix.lower()], to_pil(picture), io.BytesIO()
    icc = picture.info.get("icc_profile")
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for name, text in texts.items():
            chunks.add_text(name, text)
        image.save(stream, kind, pnginfo=chunks, icc_profile=icc, compress_level=6)
        return stream.getvalue()
    exif = Image.Exif()
    if texts:
        exif[_DESCRIPTION] = "; ".join(f"{name}={text}" for name, text in texts.items()).encode("ascii", "replace")
    if kind == "JPEG":
        image.save(stream, kind, quality=95, subsampling=0, exif=exif, icc_profile=icc)
    elif kind == "WEBP":
        image.save(stream, kind, lossless=True, exact=True, exif=exif, icc_profile=icc)
    else:
        image.save(stream, kind, compression="tiff_adobe_deflate", exif=exif, icc_profile=icc)
    return stream.getvalue()


def _png16(picture: Picture, texts: dict[str, str]) -> bytes:
    """16 bits, which Pillow writes only for gray. Source: PNG specification (W3C, third edition)."""
    planes = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
    height, width, channels = planes.shape
    rows = to_uint16(planes).astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # "up": each byte less the one above it, modulo 256
    filtered[:, 1:] = rows
    filtered[1:, 1:] -= rows[:-1]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))]
    if icc := picture.info.get("icc_profile"):
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc)))
    for name, text in texts.items():  # iTXt: uncompressed, no language, UTF-8
        chunks.append((b"iTXt", name.encode("latin-1", "replace")[:79] + b"\0\0\0\0\0" + text.encode()))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
