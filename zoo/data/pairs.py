"""Pairs of a degraded image and its target, from paired folders or made from clean images."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zoo.data.images import KEEP_BYTES, Collection, Report, as_channels, read_uint8, size_of
from zoo.data.imresize import imresize
from zoo.data.layouts import find, locate, match
from zoo.data.photos import load
from zoo.errors import UserError
from zoo.files import cache_folder
from zoo.media import list_images, write_image

logger = logging.getLogger(__name__)
SLACK = 12  # pixels of gt that mod-cropping (by 12 at most) may have taken from one half of a pair only


class Pair(NamedTuple):
    """One sample: lq is uint8 (h, w, c), gt is uint8 (h * upscale, w * upscale, c)."""

    name: str
    lq: np.ndarray
    gt: np.ndarray


@dataclass(frozen=True)
class PairSource:
    """Where a pair comes from: files, or pixels in memory; without lq it is made from gt."""

    name: str
    gt: Path | np.ndarray
    lq: Path | None = None


class Pairs(Collection[Pair]):
    """Pairs whose missing lq is made by MATLAB-like bicubic from the whole gt, rounded to 8 bits.

    gt is cut at the bottom and right to a multiple of `upscale` first. Both halves are cut to what they share when
    published files were cropped differently; a difference above 12 pixels makes a pair unusable. What is made stays
    in memory, or, for collections larger than `keep`, in the user's cache folder (ZOO_CACHE, XDG_CACHE_HOME).

    Args:
        source: where the pairs come from, for messages.
        entries: the samples.
        upscale: gt size over lq size; 1 = the same size, and a missing lq is gt itself.
        channels: 1 or 3.
        keep: memory for decoded pixels in bytes.
        without_partner: files whose other half is missing, for the report.
        notes: facts for the report.

    Raises:
        UserError: no usable pair.
    """

    def __init__(
        self,
        source: str,
        entries: Sequence[PairSource],
        upscale: int,
        *,
        channels: int = 3,
        keep: int = KEEP_BYTES,
        without_partner: Sequence[str] = (),
        notes: Sequence[str] = (),
    ) -> None:
        if upscale < 1 or channels not in (1, 3):
            raise UserError(f"data: upscale must be >= 1 and channels 1 or 3, got {upscale} and {channels}")
        self.upscale, self.channels = upscale, channels
        self._entries = {entry.name: entry for entry in entries}
        self._without_partner = list(without_partner)
        made = sum(entry.lq is None for entry in entries)
        self._notes = [*notes]
        if made and upscale > 1:
            self._notes.append(f"lq of {made} made by MATLAB-like bicubic 1/{upscale}, mod-crop {upscale}")
        self._cut: dict[str, tuple[int, int]] = {}
        self._cache_works = True
        if not entries and without_partner:
            raise UserError(
                f"{source}: no file has a partner (such as {without_partner[0]}); name lq files like gt files, "
                "or give a template such as {}x4"
            )
        super().__init__(source, [entry.name for entry in entries], keep=keep)
        if self._without_partner:
            logger.warning("%s: %d files without a partner are left out", source, len(self._without_partner))

    @property
    def has_lq(self) -> bool:
        """Whether lq comes from files rather than from gt."""
        return any(entry.lq is not None for entry in self._entries.values())

    def report(self) -> Report:
        """As for every collection; sizes are those of gt after cropping."""
        report = super().report()
        report.without_partner = list(self._without_partner)
        report.notes = list(self._notes)
        if self._cut:
            report.notes.append(f"{len(self._cut)} gt images cut by up to {np.max(list(self._cut.values()))} pixels")
        return report

    def _probe(self, name: str) -> tuple[int, int]:
        entry = self._entries[name]
        full = size_of(entry.gt) if isinstance(entry.gt, Path) else entry.gt.shape[:2]
        lq = size_of(entry.lq) if entry.lq is not None else None
        h, w = self._shared(full, lq)
        if (h, w) != tuple(full):
            self._cut[name] = (full[0] - h, full[1] - w)
        return h, w

    def _shared(self, gt: tuple[int, ...], lq: tuple[int, ...] | None) -> tuple[int, int]:
        """The gt size that both halves can deliver."""
        h, w = (n - n % self.upscale for n in gt[:2])
        if lq is not None:
            differs = max(abs(g - n * self.upscale) for g, n in zip(gt, lq, strict=True))
            if differs > max(SLACK, self.upscale):
                raise UserError(
                    f"gt is {gt[1]}x{gt[0]} but lq is {lq[1]}x{lq[0]}, which does not fit upscale {self.upscale}; "
                    "correct upscale or the files"
                )
            h, w = min(h, lq[0] * self.upscale), min(w, lq[1] * self.upscale)
        if not h or not w:
            raise UserError(f"{gt[1]}x{gt[0]} is too small for upscale {self.upscale}; remove it")
        return h, w

    def _load(self, name: str) -> Pair:
        entry = self._entries[name]
        gt = read_uint8(entry.gt, self.channels) if isinstance(entry.gt, Path) else as_channels(entry.gt, self.channels)
        lq = read_uint8(entry.lq, self.channels) if entry.lq is not None else None
        h, w = self._shared(gt.shape[:2], lq.shape[:2] if lq is not None else None)
        gt = np.ascontiguousarray(gt[:h, :w])
        if lq is None:
            lq = self._made(entry, gt) if self.upscale > 1 else gt
        return Pair(name, np.ascontiguousarray(lq[: h // self.upscale, : w // self.upscale]), gt)

    def _made(self, entry: PairSource, gt: np.ndarray) -> np.ndarray:
        path = None
        if isinstance(entry.gt, Path) and not self.in_memory:
            path = cache_file(entry.gt, self.upscale, self.channels)
        if path is not None and path.is_file():
            try:
                lq = read_uint8(path, self.channels)
                if lq.shape[:2] == (gt.shape[0] // self.upscale, gt.shape[1] // self.upscale):
                    return lq
            except (UserError, OSError):
                pass  # a damaged cache file is replaced below
        lq = imresize(gt, 1 / self.upscale)
        if path is not None and self._cache_works:
            try:
                write_image(path, lq, force=True)
            except (UserError, OSError) as error:
                self._cache_works = False
                logger.warning("lq images are made again in every pass: %s", error)
        return lq

    def _bytes_per_pixel(self) -> int:
        return self.channels + 1


class PairedFolder(Pairs):
    """The pairs of a folder in any layout that `zoo.data.layouts` knows; see `Pairs` for missing lq.

    Args:
        root: the set's own folder, such as benchmark/Set5, or the folder of gt images when `lq` is given.
        upscale: gt size over lq size.
        lq: folder of the degraded images, where no known layout says it.
        template: lq name for a gt name without endings, such as "{}x4"; None = the usual ones are tried.
        split: "train" or "valid", where one folder holds both (DIV2K).
        channels: 1 or 3.
        keep: memory for decoded pixels in bytes.

    Raises:
        FileNotFoundError: there is no such folder.
        UserError: no known layout, or no usable pair.
    """

    def __init__(
        self,
        root: str | Path,
        upscale: int,
        *,
        lq: str | Path | None = None,
        template: str | None = None,
        split: str = "train",
        channels: int = 3,
        keep: int = KEEP_BYTES,
    ) -> None:
        if template is not None and "{}" not in template:
            raise UserError(f"data: template {template!r} must hold {{}} for the gt name, such as '{{}}x4'")
        root = Path(root)
        if lq is None:
            found = find(root, upscale, split=split, template=template)
        else:
            gt_files, lq_files = list_images(locate(root)), list_images(locate(Path(lq)))
            found = match(gt_files, lq_files, upscale, f"{root.name} + {Path(lq).name}", template)
        super().__init__(
            str(root),
            [PairSource(files.name, files.gt, files.lq) for files in found.files],
            upscale,
            channels=channels,
            keep=keep,
            without_partner=found.without_partner,
            notes=[f"layout {found.layout}"],
        )


def open_pairs(
    source: str,
    upscale: int,
    *,
    split: str = "train",
    lq: str | None = None,
    template: str | None = None,
    channels: int = 3,
) -> Pairs:
    """Pairs by the word that recipes and the command line use.

    Args:
        source: "photos" (bundled with scikit-image), "demo" (chelsea, bundled with zoo), or a folder.
        upscale: gt size over lq size.
        split: "train" or "valid".
        lq: see `PairedFolder`.
        template: see `PairedFolder`.
        channels: 1 or 3.

    Raises:
        FileNotFoundError: a folder or scikit-image is missing.
        UserError: nothing usable is found.
    """
    if split not in ("train", "valid"):
        raise UserError(f"data: split must be train or valid, got {split!r}")
    if source in ("photos", "demo"):
        if lq is not None or template is not None:
            raise UserError(f"data: {source} have no lq folder; remove lq and template, or give a folder as source")
        name = "demo" if source == "demo" else {"train": "train", "valid": "validation"}[split]
        entries = [PairSource(photo.name, photo.pixels) for photo in load(name)]
        return Pairs(f"{source} ({name})", entries, upscale, channels=channels)
    return PairedFolder(source, upscale, lq=lq, template=template, split=split, channels=channels)


def cache_file(gt: Path, upscale: int, channels: int) -> Path:
    """Where the lq made from file `gt` is kept; another size or time of the file gives another name."""
    about = gt.stat()
    text = f"{gt.resolve()}|{about.st_size}|{about.st_mtime_ns}|{upscale}|{channels}"
    return cache_folder() / "lq" / f"{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}.png"
