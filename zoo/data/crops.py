"""Samples for networks: random crops for training, whole images for validation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from zoo.data.degradations import Bicubic, Degradation, augment
from zoo.data.images import KEEP_BYTES, to_array, to_tensor
from zoo.data.imresize import imresize
from zoo.data.pairs import Pair, Pairs, open_pairs
from zoo.data.realworld import RealWorld
from zoo.data.sampler import Draw, seed_of
from zoo.errors import UserError

ENLARGE = ("mirror", "bilinear")
_SHRINKING = (Bicubic, RealWorld)  # steps that make lq smaller than gt


class Crops(Dataset):
    """Training samples: each is a pure function of (seed, draw number), whoever makes it.

    The crop is drawn on the lq grid; flips and transposition come before the degradation, so that JPEG blocks and
    the like keep the orientation they have in photos.

    Args:
        source: see `open_pairs`.
        upscale: gt size over lq size.
        degradation: steps from a clean image to lq. MATLAB-like bicubic of the whole image comes first unless
            a Bicubic stands later in the list, or a RealWorld in it: then all steps act on the crop of gt.
        lq: see `open_pairs`.
        template: see `open_pairs`.
        channels: 1 or 3.
        seed: decides every random choice.
        hflip: mirror left-right with probability 1/2.
        vflip: mirror up-down with probability 1/2.
        transpose: swap height and width with probability 1/2.
        scales: each gt is first shrunk by one of these factors in (0, 1], drawn evenly: a few photos give the
            structures of many. Only where lq is made from gt.
        permute_colours: shuffle the channels of lq and gt alike, so that colours teach nothing.
        mixup: probability of blending a sample with a crop of another image (Zhang et al. 2018), lq and gt alike,
            before the other steps: no network can learn such pictures by heart.
        enlarge: what becomes of images smaller than the crop. "mirror": lq and gt go on behind their edges, the edge
            pixel repeated, which keeps them aligned at any scale. "bilinear": each side of gt that is too short is
            stretched and lq made from that, as HAT's authors do on ImageNet; only where lq is made from gt.

    Raises:
        FileNotFoundError: a folder or scikit-image is missing.
        UserError: nothing usable is found, or the steps contradict `upscale` or the files.
    """

    def __init__(
        self,
        source: str,
        upscale: int,
        degradation: Sequence[Degradation] = (),
        *,
        lq: str | None = None,
        template: str | None = None,
        channels: int = 3,
        seed: int = 0,
        hflip: bool = True,
        vflip: bool = True,
        transpose: bool = True,
        scales: Sequence[float] = (1.0,),
        permute_colours: bool = False,
        mixup: float = 0.0,
        enlarge: str = "mirror",
    ) -> None:
        self.pairs, self.steps = _open(source, upscale, degradation, "train", lq, template, channels)
        if not scales or not all(0 < scale <= 1 for scale in scales):
            raise UserError(f"data: scales must be factors in (0, 1], got {list(scales)}")
        if self.pairs.has_lq and set(scales) != {1.0}:
            raise UserError(f"data: {source} brings its own lq files; remove scales")
        if permute_colours and channels != 3:
            raise UserError(f"data: permute_colours needs channels 3, got {channels}")
        if not 0 <= mixup <= 1:
            raise UserError(f"data: mixup must be a probability, got {mixup}")
        if enlarge not in ENLARGE:
            raise UserError(f"data: enlarge must be {' or '.join(ENLARGE)}, got {enlarge!r}")
        if self.pairs.has_lq and enlarge != "mirror":
            raise UserError(f"data: {source} brings its own lq files; remove enlarge")
        self.upscale, self.seed, self.mixup, self.enlarge = upscale, seed, mixup, enlarge
        self.context = max((step.context for step in self.steps), default=0)
        self.flips = (hflip, vflip, transpose)
        self.scales, self.permute_colours = tuple(scales), permute_colours
        self._shrunk: dict[tuple[int, float], Pair] = {}
        self._room = KEEP_BYTES  # for these, in each process that makes samples

    def __len__(self) -> int:
        """Images to crop from."""
        return len(self.pairs)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """The sample of one draw: lq (c, p, p), gt (c, p * upscale, p * upscale) and its number."""
        return self.told(draw)[0]

    def told(self, draw: Draw) -> tuple[dict[str, Any], list[str]]:
        """The sample of one draw, and what its degradation drew."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "sample", draw.number))
        side = draw.crop + self.context
        lq, gt = self._crop(draw.index, side, generator)
        if self.mixup and float(torch.rand((), generator=generator)) < self.mixup:
            other = int(torch.randint(len(self), (), generator=generator))
            ends = self._crop(other, side, generator)
            share = float(torch.rand((), generator=generator))
            lq, gt = (torch.lerp(image, end, share) for image, end in zip((lq, gt), ends, strict=True))
        bicubic = self.pairs.upscale > 1 and not self.pairs.has_lq
        facts = [f"bicubic 1/{self.upscale}"] if bicubic else []
        for step in self.steps:
            lq, said = step.told(lq, generator)
            facts += said
        if self.context:
            top, left = torch.randint(0, self.context + 1, (2,), generator=generator).tolist()
            lq = _window(lq, top, left, draw.crop)
            gt = _window(gt, top * self.upscale, left * self.upscale, draw.crop * self.upscale)
        return {"lq": lq, "gt": gt, "number": draw.number}, facts

    def _crop(self, index: int, crop: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random crop of image `index` and its target, both float32 (c, ., .) in [0, 1]."""
        ratio, scale = self.pairs.upscale, 1.0
        if self.scales != (1.0,):
            scale = self.scales[int(torch.randint(len(self.scales), (), generator=generator))]
        pair = self.pairs.readable(index) if scale == 1 else self._shrink(index, scale)
        side = crop * self.upscale // ratio  # of the crop in pixels of pair.lq
        if self.enlarge == "bilinear":
            pair = _stretched(pair, side, ratio)
        lq, gt = _mirrored(pair.lq, side), _mirrored(pair.gt, side * ratio)
        top, left = (int(torch.randint(0, n - side + 1, (), generator=generator)) for n in lq.shape[:2])
        lq = lq[top : top + side, left : left + side]
        gt = gt[top * ratio : (top + side) * ratio, left * ratio : (left + side) * ratio]
        chosen = torch.rand(3, generator=generator) < 0.5
        turns = [wanted and bool(hit) for wanted, hit in zip(self.flips, chosen, strict=True)]
        order = torch.randperm(3, generator=generator) if self.permute_colours else slice(None)
        lq, gt = (augment(to_tensor(image)[order], *turns).contiguous() for image in (lq, gt))
        return lq, gt

    def _shrink(self, index: int, scale: float) -> Pair:
        """The pair of an image as if it had been taken from further away."""
        if (index, scale) in self._shrunk:
            return self._shrunk[index, scale]
        name, _, gt = self.pairs.readable(index)
        gt, ratio = imresize(gt, scale), self.pairs.upscale
        gt = gt[: gt.shape[0] // ratio * ratio, : gt.shape[1] // ratio * ratio]
        pair = Pair(name, imresize(gt, 1 / ratio) if ratio > 1 else gt, gt)
        room = self._room - pair.lq.nbytes - pair.gt.nbytes
        if room >= 0:  # all are drawn equally often, so that to replace one by another gains nothing
            self._shrunk[index, scale], self._room = pair, room
        return pair

    def smaller_than(self, crop: int) -> int:
        """How many images have to be enlarged to give a crop of `crop` lq pixels."""
        return sum(min(size) * min(self.scales) < (crop + self.context) * self.upscale for size in self.pairs.sizes)


@dataclass(frozen=True)
class ValidationSet:
    """A named set of whole images, as data in recipes.

    Args:
        source: "photos", "demo" or a folder; see `open_pairs`.
        degradation: steps as for `Crops`, by `Degradation.fixed`: one quality or sigma, not a range; weather and the
            like follow from the name of the image.
        lq: folder of lq images, where the layout does not say it.
        template: lq name for a gt name, such as "{}x4".
    """

    source: str = "photos"
    degradation: list[Degradation] = field(default_factory=list)
    lq: str | None = None
    template: str | None = None


class WholeImages:
    """The images of a validation set one by one, in a fixed order, each as a batch of one.

    Every rank sees all of them, so that means over images need no exchange and do not depend on the world size.

    Args:
        name: of the set, for metrics.
        spec: the set.
        upscale: gt size over lq size.
        channels: 1 or 3.

    Raises:
        FileNotFoundError: a folder or scikit-image is missing.
        UserError: nothing usable is found, or a step is random.
    """

    def __init__(self, name: str, spec: ValidationSet, upscale: int, channels: int = 3) -> None:
        opened = _open(spec.source, upscale, spec.degradation, "valid", spec.lq, spec.template, channels)
        self.name, self.upscale = name, upscale
        self.pairs, self.steps = opened
        for step in self.steps:
            if not isinstance(step, _SHRINKING):
                step.fixed(torch.zeros(channels, 8, 8))  # complain now, not after the first epoch

    def __len__(self) -> int:
        """Images in the set."""
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample `index`: lq (1, c, h, w), gt (1, c, h * upscale, w * upscale), name and set."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._sample(self.pairs[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All samples in order, but those whose files turn out damaged."""
        return map(self._sample, self.pairs)

    def _sample(self, pair: Pair) -> dict[str, Any]:
        lq, gt = to_tensor(pair.lq), to_tensor(pair.gt)
        h, w = (n - n % self.upscale for n in gt.shape[1:])
        lq, gt = (lq[:, :h, :w], gt[:, :h, :w]) if self.pairs.upscale == 1 else (lq, gt)
        for step in self.steps:
            lq = step.fixed(lq, pair.name)
        return {"lq": lq[None], "gt": gt[None], "name": pair.name, "set": self.name}


def _window(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[:, top : top + side, left : left + side].contiguous()


def _stretched(pair: Pair, side: int, ratio: int) -> Pair:
    """The pair with lq of at least `side` pixels each way."""
    h, w = pair.lq.shape[:2]
    if h >= side and w >= side:
        return pair
    size = (max(h, side) * ratio, max(w, side) * ratio)
    gt = to_array(functional.interpolate(to_tensor(pair.gt)[None], size, mode="bilinear")[0])
    return Pair(pair.name, imresize(gt, 1 / ratio) if ratio > 1 else gt, gt)


def _mirrored(image: np.ndarray, side: int) -> np.ndarray:
    h, w = image.shape[:2]
    if h >= side and w >= side:
        return image
    return np.pad(image, ((0, max(0, side - h)), (0, max(0, side - w)), (0, 0)), mode="symmetric")


def _open(
    source: str,
    upscale: int,
    degradation: Sequence[Degradation],
    split: str,
    lq: str | None,
    template: str | None,
    channels: int,
) -> tuple[Pairs, list[Degradation]]:
    """The pairs and the steps that remain for each sample."""
    steps = list(degradation)
    shrinks = [i for i, step in enumerate(steps) if isinstance(step, _SHRINKING)]
    if shrinks and (len(shrinks) > 1 or steps[shrinks[0]].upscale != upscale):  # pyright: ignore
        names = " or ".join(known.__name__ for known in _SHRINKING)
        raise UserError(f"degradation: one {names} with upscale {upscale} is possible, got {steps}; correct the recipe")
    if shrinks == [0] and isinstance(steps[0], Bicubic):
        steps, shrinks = steps[1:], []
    pairs = open_pairs(source, 1 if shrinks else upscale, split=split, lq=lq, template=template, channels=channels)
    if pairs.has_lq and any(isinstance(step, _SHRINKING) for step in degradation):
        raise UserError(f"degradation: {source} brings its own lq files; remove what shrinks from {list(degradation)}")
    return pairs, steps
