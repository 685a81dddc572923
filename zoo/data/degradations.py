"""What makes a good image bad: one small dataclass per step, given as data in recipes.

A step maps lq to a worse lq. In training its random choices come from a generator that belongs to the sample; for
evaluation `fixed` gives the result that published protocols prescribe, the same every time.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoo.data.imresize import imresize
from zoo.data.jpeg import jpeg
from zoo.errors import UserError


class Degradation(ABC):
    """One step: a floating (c, h, w) image in [0, 1] becomes another one."""

    @abstractmethod
    def __call__(self, lq: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade at random, as in training.

        Args:
            lq: (c, h, w).
            generator: the only source of randomness.

        Returns:
            (c, h', w'), same dtype.
        """

    @abstractmethod
    def fixed(self, lq: Tensor) -> Tensor:
        """Degrade as the published test protocol does: no choice is left to chance.

        Raises:
            UserError: the step is a range, so that no single result is meant.
        """


@dataclass(frozen=True)
class Bicubic(Degradation):
    """Shrink by MATLAB-like bicubic and round to 8 bits, as published LR files are made.

    Args:
        upscale: the factor that a restorer has to undo.
    """

    upscale: int = 2

    def __post_init__(self) -> None:
        """Refuse an impossible factor."""
        if self.upscale < 1:
            raise UserError(f"Bicubic: upscale must be a whole number of at least 1, got {self.upscale}")

    def __call__(self, lq: Tensor, generator: torch.Generator) -> Tensor:
        """Shrink; nothing here is random."""
        return self.fixed(lq)

    def fixed(self, lq: Tensor) -> Tensor:
        """Shrink (c, h, w); bottom and right are cut to a multiple of `upscale` first (mod-crop)."""
        h, w = (n - n % self.upscale for n in lq.shape[-2:])
        return _round8(imresize(lq[..., :h, :w].double(), 1 / self.upscale)).to(lq.dtype)


@dataclass(frozen=True)
class Jpeg(Degradation):
    """Save as a JPEG file and read it again (4:2:0, baseline tables).

    Args:
        quality: 1 (worst) to 100, or a pair between which it is drawn, both ends included.
        probability: how often the step happens at all.
    """

    quality: int | tuple[int, int] = (30, 95)
    probability: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an impossible quality or probability."""
        _check_range("Jpeg: quality", self.quality, 1, 100)
        _check_probability("Jpeg", self.probability)

    def __call__(self, lq: Tensor, generator: torch.Generator) -> Tensor:
        """Compress with a drawn quality."""
        if not _happens(self.probability, generator):
            return lq
        low, high = _ends(self.quality)
        return jpeg(lq, int(torch.randint(int(low), int(high) + 1, (), generator=generator)))

    def fixed(self, lq: Tensor) -> Tensor:
        """Compress with the one quality given."""
        return jpeg(lq, int(_single("Jpeg: quality", self.quality, self.probability)))


@dataclass(frozen=True)
class Noise(Degradation):
    """Add white Gaussian noise, independent in every pixel and channel; the result is neither clipped nor rounded.

    Args:
        sigma: standard deviation in 8-bit levels (25 means 25/255), or a pair between which it is drawn uniformly.
        probability: how often the step happens at all.
    """

    sigma: float | tuple[float, float] = (0.0, 50.0)
    probability: float = 1.0

    def __post_init__(self) -> None:
        """Refuse an impossible sigma or probability."""
        _check_range("Noise: sigma", self.sigma, 0, 255)
        _check_probability("Noise", self.probability)

    def __call__(self, lq: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise of a drawn strength."""
        if not _happens(self.probability, generator):
            return lq
        low, high = _ends(self.sigma)
        sigma = low + (high - low) * float(torch.rand((), generator=generator))
        return lq + torch.randn(lq.shape, generator=generator, dtype=lq.dtype) * (sigma / 255)

    def fixed(self, lq: Tensor) -> Tensor:
        """Add the noise of the denoising benchmarks: see `add_noise`."""
        return add_noise(lq, _single("Noise: sigma", self.sigma, self.probability))


def add_noise(image: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """The noise of the denoising benchmarks: numpy's legacy generator, seeded anew before each image.

    Args:
        image: (c, h, w) in [0, 1], RGB.
        sigma: standard deviation in 8-bit levels.
        seed: 0 in all published figures.

    Returns:
        (c, h, w), same dtype; neither clipped nor rounded.

    Source: SwinIR main_test_swinir.py. It draws in (h, w, c) order for BGR images.
    """
    c, h, w = image.shape
    noise = np.random.RandomState(seed).normal(0, sigma / 255, (h, w, c))
    return (image.double() + torch.from_numpy(noise[..., ::-1].copy()).permute(2, 0, 1)).to(image.dtype)


def augment(x: Tensor, hflip: bool = False, vflip: bool = False, transpose: bool = False) -> Tensor:
    """Mirror left-right, then up-down, then swap height and width of (..., h, w), each if asked for."""
    if hflip:
        x = x.flip(-1)
    if vflip:
        x = x.flip(-2)
    return x.transpose(-1, -2) if transpose else x


def _round8(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


def _happens(probability: float, generator: torch.Generator) -> bool:
    # Drawn even when certain, so that changing the probability leaves the other choices of a sample as they were.
    return float(torch.rand((), generator=generator)) < probability


def _ends(value: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(value, int | float):
        return value, value
    low, high = value
    return low, high


def _single(what: str, value: float | tuple[float, float], probability: float) -> float:
    low, high = _ends(value)
    if low != high or probability != 1:
        raise UserError(f"{what} must be one number with probability 1 for validation, got {value} and {probability}")
    return low


def _check_range(what: str, value: float | tuple[float, float], least: float, most: float) -> None:
    if not isinstance(value, int | float) and len(value) != 2:
        raise UserError(f"{what} must be a number or a pair, got {value}")
    low, high = _ends(value)
    if not least <= low <= high <= most:
        raise UserError(f"{what} must lie in {least} to {most}, the smaller end first, got {value}")


def _check_probability(what: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{what}: probability must lie in 0 to 1, got {value}")
