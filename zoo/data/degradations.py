"""What makes a good image bad: one small dataclass per step, given as data in recipes.

A step maps lq to a worse lq. In training its random choices come from a generator that belongs to the sample; for
evaluation `fixed` gives the same result every time, that of the published protocol where there is one. The steps for
photos of the real world and for weather stand in `realworld.py` and `weather.py`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from zoo.data.imresize import imresize
from zoo.data.jpeg import diffjpeg, jpeg
from zoo.data.sampler import seed_of
from zoo.errors import UserError


class Degradation(ABC):
    """One step: a floating (c, h, w) image in [0, 1] becomes another one.

    Attributes:
        context: pixels of the result that training makes beyond a crop and cuts off again, so that borders and the
            grid of JPEG blocks lie anywhere.
    """

    context: ClassVar[int] = 0

    def __call__(self, lq: Tensor, generator: torch.Generator) -> Tensor:
        """Degrade at random, as in training.

        Args:
            lq: (c, h, w).
            generator: the only source of randomness.

        Returns:
            (c, h', w'), same dtype.
        """
        return self.told(lq, generator)[0]

    @abstractmethod
    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Degrade at random, and tell what was drawn, such as ["jpeg 74"]; nothing where nothing happened."""

    def fixed(self, lq: Tensor, name: str = "") -> Tensor:
        """Degrade the same way every time, for evaluation: with random numbers that follow from the image's name.

        Args:
            lq: (c, h, w).
            name: of the image; steps with a published test protocol follow that and pass it over.

        Raises:
            UserError: a protocol exists and the step is a range, so that no single result is meant.
        """
        return self(lq, torch.Generator().manual_seed(seed_of(0, type(self).__name__, name)))


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

    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Shrink; nothing here is random."""
        return self.fixed(lq), [f"bicubic 1/{self.upscale}"]

    def fixed(self, lq: Tensor, name: str = "") -> Tensor:
        """Shrink (c, h, w); bottom and right are cut to a multiple of `upscale` first (mod-crop)."""
        h, w = (n - n % self.upscale for n in lq.shape[-2:])
        return round8(imresize(lq[..., :h, :w].double(), 1 / self.upscale)).to(lq.dtype)


@dataclass(frozen=True)
class Jpeg(Degradation):
    """Save as a JPEG file and read it again (4:2:0, baseline tables).

    Args:
        quality: 1 (worst) to 100, or a pair between which it is drawn, both ends included.
        probability: how often the step happens at all.
        simulated: take the imitation that `zoo.data.jpeg.diffjpeg` computes, instead of libjpeg.
    """

    quality: int | tuple[int, int] = (30, 95)
    probability: float = 1.0
    simulated: bool = False

    def __post_init__(self) -> None:
        """Refuse an impossible quality or probability."""
        check_range("Jpeg: quality", self.quality, 1, 100)
        check_probability("Jpeg: probability", self.probability)

    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Compress with a drawn quality."""
        if not happens(self.probability, generator):
            return lq, []
        low, high = _ends(self.quality)
        quality = int(torch.randint(int(low), int(high) + 1, (), generator=generator))
        return self._coded(lq, quality), [f"jpeg {quality}"]

    def fixed(self, lq: Tensor, name: str = "") -> Tensor:
        """Compress with the one quality given."""
        return self._coded(lq, int(_single("Jpeg: quality", self.quality, self.probability)))

    def _coded(self, lq: Tensor, quality: int) -> Tensor:
        return round8(diffjpeg(lq.clamp(0, 1)[None], quality)[0]) if self.simulated else jpeg(lq, quality)


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
        check_range("Noise: sigma", self.sigma, 0, 255)
        check_probability("Noise: probability", self.probability)

    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Add noise of a drawn strength."""
        if not happens(self.probability, generator):
            return lq, []
        sigma = uniform(self.sigma, generator)
        noise = torch.randn(lq.shape, generator=generator, dtype=lq.dtype) * (sigma / 255)
        return lq + noise, [f"noise {sigma:.1f}"]

    def fixed(self, lq: Tensor, name: str = "") -> Tensor:
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


def round8(x: Tensor) -> Tensor:
    """Clamped to [0, 1] and rounded to multiples of 1/255, as 8-bit files are."""
    return (x.clamp(0, 1) * 255).round() / 255


def happens(probability: float, generator: torch.Generator) -> bool:
    """Whether something happens this time."""
    # Drawn even when certain, so that changing the probability leaves the other choices of a sample as they were.
    return float(torch.rand((), generator=generator)) < probability


def uniform(value: float | tuple[float, float], generator: torch.Generator) -> float:
    """A number between the ends of a range; drawn also where they are the same."""
    low, high = _ends(value)
    return low + (high - low) * float(torch.rand((), generator=generator))


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


def check_range(what: str, value: float | tuple[float, float], least: float, most: float) -> None:
    """Refuse what is neither a number nor a pair of numbers, the smaller one first, between `least` and `most`."""
    if not isinstance(value, int | float) and len(value) != 2:
        raise UserError(f"{what} must be a number or a pair, got {value}")
    low, high = _ends(value)
    if not least <= low <= high <= most:
        raise UserError(f"{what} must lie in {least} to {most}, the smaller end first, got {value}")


def check_probability(what: str, value: float) -> None:
    """Refuse a share outside 0 to 1."""
    if not 0 <= value <= 1:
        raise UserError(f"{what} must lie in 0 to 1, got {value}")
