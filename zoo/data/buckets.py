"""Images of many shapes for networks that take few: each goes to the bucket whose aspect ratio comes nearest.

All buckets have about the same area, so that any batch costs about the same.
Source: NovelAI, "Aspect Ratio Bucketing" (2022).
"""

import contextlib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from zoo.data.captions import CaptionedFolder, choose
from zoo.data.images import Report, to_tensor
from zoo.data.sampler import Draw, seed_of
from zoo.data.stages import Stage
from zoo.errors import UserError


@cache
def bucket_sizes(side: int, multiple: int = 8, aspect: float = 2.0) -> tuple[tuple[int, int], ...]:
    """Sizes (h, w) of at most side * side pixels, the square first.

    Args:
        side: of the square, pixels.
        multiple: what height and width are multiples of, pixels.
        aspect: longest side over shortest at most; 1 = the square alone.

    Raises:
        UserError: numbers that contradict each other.
    """
    if multiple < 1 or side < 1 or side % multiple or not 1 <= aspect < 100:
        raise UserError(
            f"data: patch_size must be a multiple of `multiple` and aspect at least 1, got {side}, {multiple}, {aspect}"
        )
    wide = []
    for width in range(side, round(side * aspect) + 1, multiple):
        height = side * side // width // multiple * multiple
        if height and width <= aspect * height:
            wide.append((height, width))
    return tuple(dict.fromkeys(size for h, w in wide for size in ((h, w), (w, h))))


def assign(
    sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]], fewest: int = 1
) -> tuple[np.ndarray, int]:
    """The bucket of each image.

    Args:
        sizes: (h, w) of the images.
        buckets: (h, w) of the buckets.
        fewest: images that a bucket needs; smaller ones are given up, rarest first, and theirs go to the nearest of
            the others, so that no batch is one image over and over.

    Returns:
        Indices into `buckets`, one per image, and how many images did not get their nearest bucket.
    """
    ratios = np.log([w / h for h, w in sizes])
    away = np.abs(ratios[:, None] - np.log([w / h for h, w in buckets]))  # images buckets
    nearest = away.argmin(1)
    chosen = nearest
    while True:
        filled, counts = np.unique(chosen, return_counts=True)
        if len(filled) == 1 or counts.min() >= fewest:
            return chosen, int((chosen != nearest).sum())
        kept = np.delete(filled, counts.argmin())
        chosen = kept[away[:, kept].argmin(1)]


class Buckets(Dataset):
    """Captioned images, each enlarged or shrunk to cover its bucket and cut in the middle.

    A sample is {"image": float32 (3, h, w) in [0, 1], "caption": str, "number": int}: a pure function of (seed, draw).

    Args:
        images: where they come from.
        chosen: which of them.
        stages: patch sizes, whose squares the buckets are as large as, and batch sizes, which a bucket must fill.
        multiple: see `bucket_sizes`.
        aspect: see `bucket_sizes`.
        hflip: mirror left-right with probability 1/2.
        seed: decides flips and which of several captions a sample gets.
        every_caption: give the tuple of all captions in place of one.

    Raises:
        UserError: patch sizes that are no multiples.
    """

    def __init__(
        self,
        images: CaptionedFolder,
        chosen: Sequence[int],
        stages: Sequence[Stage],
        *,
        multiple: int = 8,
        aspect: float = 2.0,
        hflip: bool = False,
        seed: int = 0,
        every_caption: bool = False,
    ) -> None:
        self.images, self.chosen = images, list(chosen)
        self.hflip, self.seed, self.every_caption = hflip, seed, every_caption
        self._sizes = {stage.patch_size: bucket_sizes(stage.patch_size, multiple, aspect) for stage in stages}
        self._side = stages[-1].patch_size
        sizes = [images.sizes[index] for index in self.chosen]
        self._buckets: dict[int, np.ndarray] = {}
        self._notes = []
        for side, buckets in self._sizes.items():
            fewest = max(stage.batch_size for stage in stages if stage.patch_size == side)
            self._buckets[side], moved = assign(sizes, buckets, fewest)
            counts = Counter(buckets[bucket] for bucket in self._buckets[side])
            listed = ", ".join(f"{w}x{h} ({n})" for (h, w), n in counts.most_common())
            self._notes.append(f"buckets of patch_size {side}: {listed}")
            if moved:
                self._notes.append(f"{moved} images are cut to a more common shape, as theirs fill no batch")
            small = sum(h0 < h or w0 < w for (h0, w0), (h, w) in zip(sizes, self.sizes(side), strict=True))
            if small:
                self._notes.append(f"{small} images are enlarged for patch_size {side}")

    def __len__(self) -> int:
        """Images."""
        return len(self.chosen)

    def __getitem__(self, draw: int | Draw) -> dict[str, Any]:
        """Sample of a Draw, or of an index at the patch size of the last stage.

        An image that turns out damaged only now is replaced by the next one.

        Raises:
            UserError: none can be read any more.
        """
        index, number, side = (
            (draw.index, draw.number, draw.crop) if isinstance(draw, Draw) else (draw, draw, self._side)
        )
        for place in range(len(self)):
            with contextlib.suppress(UserError):
                _, pixels, captions = self.images[self.chosen[(index + place) % len(self)]]
                break
        else:
            raise UserError(f"{self.images.source}: none of its images can be read any more; get the files again")
        pixels = cover(pixels, self._sizes[side][self._buckets[side][index]])
        if self.hflip and seed_of(self.seed, "hflip", number) % 2:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        caption = captions if self.every_caption else choose(captions, self.seed, number)
        return {"image": to_tensor(pixels), "caption": caption, "number": number}

    def groups(self, stage: Stage) -> Sequence[int]:
        """The bucket of every image, for `StepSampler`."""
        return self._buckets[stage.patch_size].tolist()

    def sizes(self, side: int) -> list[tuple[int, int]]:
        """Height and width that every image has at a patch size."""
        return [self._sizes[side][bucket] for bucket in self._buckets[side]]

    def report(self) -> Report:
        """As for the folder, with its buckets."""
        report = self.images.report()
        report.notes += self._notes
        return report


def cover(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of an image at another size: antialiased Lanczos, no side stretched.

    Args:
        pixels: uint8 (h, w, 3).
        size: height and width of the result.
    """
    (height, width), (h, w) = pixels.shape[:2], size
    shrink = min(height / h, width / w)
    left, top = (width - w * shrink) / 2, (height - h * shrink) / 2
    box = (left, top, left + w * shrink, top + h * shrink)
    box = (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))
    return np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.LANCZOS, box=box))
