"""Collections of image files that report what they hold: sizes, damaged files, files without a partner."""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import UserError
from zoo.media import read_image, to_uint8, to_unit

logger = logging.getLogger(__name__)
Sample = TypeVar("Sample")
_Read = TypeVar("_Read")
KEEP_BYTES = 512 * 2**20  # collections whose decoded pixels fit into this are read once and stay in memory
_LISTED = 20  # names in one log line or report
_TAIL = 2**16  # bytes at the end of a PNG that are searched for an orientation


@dataclass
class Report:
    """What a collection found.

    Args:
        source: where the images come from.
        count: usable samples.
        sizes: how many samples have which (h, w); of gt where there are pairs.
        unreadable: name -> reason, of everything that was left out.
        without_partner: files of a pair whose other half is missing.
        notes: further facts in one phrase each.
    """

    source: str
    count: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)
    without_partner: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Some lines for a log or a terminal."""
        lines = [f"{self.source}: {self.count} images"]
        if self.sizes:
            heights, widths = zip(*self.sizes, strict=True)
            common = ", ".join(f"{w}x{h} ({n})" for (h, w), n in self.sizes.most_common(5))
            lines.append(f"  width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}; {common}")
        lines += [f"  {note}" for note in self.notes]
        if self.unreadable:
            listed = _listed([f"{name} ({why})" for name, why in self.unreadable.items()])
            lines.append(f"  left out {len(self.unreadable)}: {listed}")
        if self.without_partner:
            lines.append(f"  without a partner {len(self.without_partner)}: {_listed(self.without_partner)}")
        return "\n".join(lines)


class Collection(ABC, Generic[Sample]):
    """Named samples. Damaged ones are left out, named in one warning and counted in the report; they never crash.

    Headers of all files are read at the start. When all pixels fit into `keep` bytes everything is decoded then, too;
    otherwise a file may turn out damaged later: whoever iterates gets the samples but this one.

    Args:
        source: where the samples come from, for messages.
        names: one per sample.
        keep: memory for decoded pixels in bytes.

    Raises:
        UserError: nothing readable is left.
    """

    def __init__(self, source: str, names: Sequence[str], *, keep: int = KEEP_BYTES) -> None:
        self.source = source
        self.names = list(names)
        self._unreadable: dict[str, str] = {}
        self._kept: dict[str, Sample] = {}
        sizes = {name: size for name in self.names if (size := self._try(self._probe, name)) is not None}
        self.in_memory = sum(h * w * self._bytes_per_pixel() for h, w in sizes.values()) <= keep
        if self.in_memory:
            self._kept = {name: sample for name in sizes if (sample := self._try(self._load, name)) is not None}
            sizes = {name: sizes[name] for name in self._kept}
        self.names, self.sizes = list(sizes), list(sizes.values())
        if self._unreadable:
            listed = _listed([f"{name} ({why})" for name, why in self._unreadable.items()])
            logger.warning("%s: %d of %d left out: %s", source, len(self._unreadable), len(names), listed)
        if not self.names:
            why = next(iter(self._unreadable.items()), None)
            first = f" (the first, {why[0]}: {why[1]})" if why else ""
            raise UserError(f"{source}: no readable image{first}; give a folder of PNG, JPEG, WebP, TIFF or BMP files")

    @abstractmethod
    def _probe(self, name: str) -> tuple[int, int]:
        """Height and width from the header alone; UserError or OSError when the sample cannot be used."""

    @abstractmethod
    def _load(self, name: str) -> Sample:
        """The decoded sample; UserError or OSError when it cannot be used."""

    @abstractmethod
    def _bytes_per_pixel(self) -> int:
        """Memory that a decoded sample takes per pixel of its size."""

    def __len__(self) -> int:
        """Usable samples, as far as known at the start."""
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`.

        Raises:
            UserError: its file turned out damaged only now.
        """
        sample, name = self._read(index), self.names[index]
        if sample is None:
            raise UserError(f"{self.source}: {name} is left out: {self._unreadable[name]}")
        return sample

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order, without those that turn out damaged; UserError when none is left."""
        found = False
        for index in range(len(self)):
            if (sample := self._read(index)) is not None:
                found = True
                yield sample
        if not found:
            raise self._nothing()

    def readable(self, index: int) -> Sample:
        """Sample `index`, or the next one that can be read: for random draws, which need one and do not care which.

        Raises:
            UserError: no sample can be read any more.
        """
        places = (place % len(self) for place in range(index, index + len(self)))
        sample = next((sample for place in places if (sample := self._read(place)) is not None), None)
        if sample is None:
            raise self._nothing()
        return sample

    def report(self) -> Report:
        """Count, sizes and everything that was left out so far, as this process knows it."""
        good = [size for name, size in zip(self.names, self.sizes, strict=True) if name not in self._unreadable]
        return Report(self.source, len(good), Counter(good), dict(self._unreadable))

    def _read(self, index: int) -> Sample | None:
        """Sample `index`, or None and one warning when its file is damaged."""
        name = self.names[index]
        if name in self._kept or name in self._unreadable:
            return self._kept.get(name)
        sample = self._try(self._load, name)
        if sample is None:
            lost = sum(each in self._unreadable for each in self.names)
            why = self._unreadable[name]
            logger.warning("%s: %s is left out from now on, %d of %d: %s", self.source, name, lost, len(self), why)
        return sample

    def _nothing(self) -> UserError:
        return UserError(f"{self.source}: none of its {len(self)} images can be read; get the files again")

    def _try(self, read: Callable[[str], _Read], name: str) -> _Read | None:
        try:
            return read(name)
        except (UserError, OSError) as error:
            self._unreadable[name] = str(error)
            return None


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image file once it is turned upright, from its header.

    Raises:
        UserError: not an image.
        OSError: the file cannot be opened.
    """
    if not path.stat().st_size:
        raise UserError("empty file (0 bytes); get it again")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "TIFF":  # some versions of Pillow have turned this size already, some have not
                width, height = (image.tag_v2[tag] for tag in (256, 257))  # pyright: ignore
            turned = _exif(path, image).get(0x0112, 1) >= 5  # orientations that swap the sides
            return (width, height) if turned else (height, width)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, TypeError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError("not an image that can be read; get the file again or remove it") from error


def _exif(path: Path, image: Image.Image) -> Image.Exif:
    """What an opened file says of itself. A PNG decodes all its pixels when asked, as more may stand behind them."""
    if image.format != "PNG":
        return image.getexif()
    with path.open("rb") as file:
        file.seek(-min(_TAIL, path.stat().st_size), os.SEEK_END)
        end = file.read()
    late = any(word in end for word in (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"))
    return image.getexif() if late else Image.Image.getexif(image)


def read_uint8(path: Path, channels: int) -> np.ndarray:
    """Decode to uint8 (h, w, channels); see `as_channels` for what becomes of gray and colour.

    Raises:
        UserError: damaged or not an image.
        OSError: the file cannot be opened.
    """
    return as_channels(to_uint8(read_image(path).pixels), channels)


def as_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (h, w, 1 or 3) as (h, w, channels): gray repeated, or colour as rounded BT.601 luma of 16 to 235."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    luma = pixels @ np.array([65.481, 128.553, 24.966]) / 255 + 16
    return luma.round().astype(np.uint8)[..., None]


def to_tensor(image: np.ndarray) -> Tensor:
    """(h, w, c), uint8 or float in [0, 1], as float32 (c, h, w) in [0, 1]."""
    return torch.from_numpy(to_unit(image)).permute(2, 0, 1).contiguous()  # c h w


def to_array(image: Tensor) -> np.ndarray:
    """(c, h, w) on any device as float32 (h, w, c), clamped to [0, 1]; what is not a number becomes 0."""
    return image.detach().float().nan_to_num().clamp(0, 1).permute(1, 2, 0).cpu().numpy()  # h w c


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "; ".join(names[:_LISTED]) + more
