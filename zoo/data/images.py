"""Collections of image files that report what they hold: sizes, damaged files, files without a partner."""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from PIL import Image

from zoo.errors import UserError
from zoo.media import list_images, read_image, to_uint8

logger = logging.getLogger(__name__)
Sample = TypeVar("Sample")
_Read = TypeVar("_Read")
KEEP_BYTES = 512 * 2**20  # collections whose decoded pixels fit into this are read once and stay in memory
_LISTED = 20  # names in one log line or report


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
    otherwise a file that turns out damaged later is replaced by the next readable sample.

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
        """Sample `index`, or the next readable one when its file turns out damaged only now."""
        for place in range(index, index + len(self.names)):
            name = self.names[place % len(self.names)]
            if name in self._kept:
                return self._kept[name]
            known = name in self._unreadable
            sample = None if known else self._try(self._load, name)
            if sample is not None:
                return sample
            if not known:
                logger.warning("%s: %s is left out from now on: %s", self.source, name, self._unreadable[name])
        raise UserError(f"{self.source}: none of its {len(self.names)} images can be read; get the files again")

    def __iter__(self) -> Iterator[Sample]:
        """All samples in order."""
        return (self[index] for index in range(len(self)))

    def report(self) -> Report:
        """Count, sizes and everything that was left out so far, as this process knows it."""
        good = [size for name, size in zip(self.names, self.sizes, strict=True) if name not in self._unreadable]
        return Report(self.source, len(good), Counter(good), dict(self._unreadable))

    def _try(self, read: Callable[[str], _Read], name: str) -> _Read | None:
        try:
            return read(name)
        except (UserError, OSError) as error:
            self._unreadable[name] = str(error)
            return None


class ImageFolder(Collection[np.ndarray]):
    """The images of a folder as uint8 (h, w, c), in natural order; transparency is ignored.

    Args:
        root: the folder.
        recursive: take sub-folders, too; names then hold their path.
        channels: 3 = RGB, gray repeated; 1 = gray, colour as rounded BT.601 luma of 16 to 235.
        keep: memory for decoded pixels in bytes.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: it holds no readable image.
    """

    def __init__(self, root: str | Path, *, recursive: bool = False, channels: int = 3, keep: int = KEEP_BYTES) -> None:
        self.channels = channels
        root = Path(root)
        self.paths = {path.relative_to(root).as_posix(): path for path in list_images(root, recursive)}
        super().__init__(str(root), list(self.paths), keep=keep)

    def _probe(self, name: str) -> tuple[int, int]:
        return size_of(self.paths[name])

    def _load(self, name: str) -> np.ndarray:
        return read_uint8(self.paths[name], self.channels)

    def _bytes_per_pixel(self) -> int:
        return self.channels


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
            # Asking a PNG for EXIF would decode it, as the chunk may stand at the end; hardly any PNG is turned.
            turned = image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
            width, height = image.size
            return (width, height) if turned else (height, width)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, TypeError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise UserError("not an image that can be read; get the file again or remove it") from error


def read_uint8(path: Path, channels: int) -> np.ndarray:
    """Decode to uint8 (h, w, channels); see `ImageFolder` for what becomes of gray and colour.

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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "; ".join(names[:_LISTED]) + more
