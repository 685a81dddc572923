"""Rain, snow and raindrops painted on clean photos, as heavy as a stated PSNR says."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.data.degradations import Degradation, check_probability, check_range, happens, round8, uniform
from zoo.errors import UserError

Range = tuple[float, float]
_AREA = 128 * 128  # pixels that counts of streaks, flakes and drops are given for
_DOSES, _MOST = 5, 8.0  # additions of weather until a photo is spoilt enough; amount in one of them
_BRIGHT = 0.6  # mean of a photo above which rain and snow look dark


class Painting(ABC):
    """A photo and the weather that gathers before it.

    Args:
        lq: the photo, (c, h, w) in [0, 1].
        generator: of everything random.
    """

    def __init__(self, lq: Tensor, generator: torch.Generator) -> None:
        self.lq, self.generator = lq, generator
        self.facts: list[str] = []

    @abstractmethod
    def add(self, amount: float) -> None:
        """Let more weather come; 1 is a usual amount."""

    @abstractmethod
    def picture(self) -> Tensor:
        """The photo through all of it, (c, h, w)."""

    def draw(self, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform numbers, (count,)."""
        return low + (high - low) * torch.rand(count, generator=self.generator)

    def count(self, amount: float, margin: int = 0) -> int:
        """Things that fall on the photo and a margin around it, of which `amount` fall on 128 x 128 pixels."""
        h, w = self.lq.shape[-2:]
        return max(1, round(amount * (h + 2 * margin) * (w + 2 * margin) / _AREA))


@dataclass(frozen=True)
class Painted(Degradation):
    """What all weather shares: it is added until the photo is worse than asked for, and then thinned out.

    The result is a blend of the clean and the spoilt photo; the share of the latter follows from the squared error. A
    photo that weather changes too little, such as a blank page, is veiled for the rest.

    Args:
        psnr: of the result against the clean image, dB over RGB in 8 bits, or a pair between which it is drawn.
        probability: how often the step happens at all.
    """

    psnr: float | Range = (20.0, 26.0)
    probability: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        check_range(f"{type(self).__name__}: psnr", self.psnr, 10, 50)
        check_probability(f"{type(self).__name__}: probability", self.probability)

    @abstractmethod
    def painting(self, lq: Tensor, wanted: float, generator: torch.Generator) -> Painting:
        """One before `lq` on which nothing has fallen yet; `wanted` is the squared error that it shall come to."""

    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Paint weather of a drawn strength on (c, h, w); the result is rounded to 8 bits."""
        if not happens(self.probability, generator):
            return lq, []
        psnr = uniform(self.psnr, generator)
        wanted = 10 ** (-psnr / 10)
        clean = lq.float()
        painting = self.painting(clean, wanted, generator)
        spoilt, reached, amount, total = clean, 0.0, 0.35, 0.0
        for _ in range(_DOSES):
            painting.add(amount)
            total += amount
            spoilt = painting.picture()
            reached = _error(spoilt, clean)
            if reached >= wanted:
                break
            amount = min(1.1 * total * (wanted / max(reached, 1e-6) - 1) + 0.1, _MOST)
        if reached < wanted:
            spoilt = _veiled(spoilt, clean, wanted)
            reached = _error(spoilt, clean)
        spoilt = round8(torch.lerp(clean, spoilt, math.sqrt(wanted / reached))).to(lq.dtype)
        return spoilt, [f"{type(self).__name__.lower()} {psnr:.1f} dB", *painting.facts]


@dataclass(frozen=True)
class Rain(Painted):
    """Streaks in three depths, all of one direction, and haze.

    Args:
        psnr: see `Painted`.
        probability: see `Painted`.
        angle: direction off the vertical, degrees; positive falls towards the right.
        length: of the streaks in the middle distance, pixels.
        veil: share of the squared error that haze makes.
    """

    angle: Range = (-35.0, 35.0)
    length: Range = (10.0, 24.0)
    veil: Range = (0.0, 0.4)

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        super().__post_init__()
        check_range("Rain: angle", self.angle, -90, 90)
        check_range("Rain: length", self.length, 1, 1000)
        check_range("Rain: veil", self.veil, 0, 0.9)

    def painting(self, lq: Tensor, wanted: float, generator: torch.Generator) -> Painting:
        """A painting of rain."""
        return _Rainfall(self, lq, wanted, generator)


@dataclass(frozen=True)
class Snow(Painted):
    """Flakes in five depths, the near ones large and out of focus, drifting in one direction, and haze.

    Args:
        psnr: see `Painted`.
        probability: see `Painted`.
        size: radius of a flake in the middle distance, pixels.
        veil: share of the squared error that haze makes.
    """

    size: Range = (1.2, 2.0)
    veil: Range = (0.0, 0.4)

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        super().__post_init__()
        check_range("Snow: size", self.size, 0.3, 100)
        check_range("Snow: veil", self.veil, 0, 0.9)

    def painting(self, lq: Tensor, wanted: float, generator: torch.Generator) -> Painting:
        """A painting of snow."""
        return _Snowfall(self, lq, wanted, generator)


@dataclass(frozen=True)
class Raindrops(Painted):
    """Drops on a pane before the lens: each shows the scene upside down, shrunk and blurred, with a dark rim.

    Args:
        psnr: see `Painted`.
        probability: see `Painted`.
        size: radius of the drops, pixels; small ones are the most.
    """

    size: Range = (3.0, 16.0)

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        super().__post_init__()
        check_range("Raindrops: size", self.size, 1, 500)

    def painting(self, lq: Tensor, wanted: float, generator: torch.Generator) -> Painting:
        """A painting of a wet pane."""
        return _WetPane(self, lq, generator)


@dataclass(frozen=True)
class Weather(Degradation):
    """One of rain, snow and raindrops, drawn for each image.

    Args:
        psnr: see `Painted`.
        probability: see `Painted`.
        rain: share of the images.
        snow: share of the images.
        raindrops: share of the images.
    """

    KINDS: ClassVar = (Rain, Snow, Raindrops)
    psnr: float | Range = (20.0, 26.0)
    probability: float = 1.0
    rain: float = 1.0
    snow: float = 1.0
    raindrops: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        shares = (self.rain, self.snow, self.raindrops)
        if min(shares) < 0 or not sum(shares):
            raise UserError(f"Weather: rain, snow and raindrops must be shares, not all 0, got {shares}")
        Rain(self.psnr, self.probability)

    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Paint one kind of weather."""
        shares = torch.tensor([self.rain, self.snow, self.raindrops], dtype=torch.float64)
        kind = self.KINDS[int(torch.multinomial(shares, 1, generator=generator))]
        return kind(self.psnr, self.probability).told(lq, generator)


class _Fall(Painting):
    """Things that fall, as a map of how much of them lies before each pixel, of light of one colour, behind haze."""

    margin: int  # around the photo, where things lie that reach into it

    def __init__(self, veil: Range, lq: Tensor, wanted: float, generator: torch.Generator) -> None:
        super().__init__(lq, generator)
        h, w = lq.shape[-2:]
        own = lq.mean((1, 2))
        light = self.draw(1, 0.1, 0.3) if own.mean() > _BRIGHT else self.draw(1, 0.85, 1.0)
        self.light = (0.85 * light + 0.15 * own)[:, None, None]
        self.density = lq.new_zeros(h + 2 * self.margin, w + 2 * self.margin)
        uneven = F.interpolate(self.draw(9, 0.5, 1.0).view(1, 1, 3, 3), (h, w), mode="bilinear", align_corners=True)[0]
        full = torch.lerp(lq, self.light.expand_as(lq), uneven)
        share = float(self.draw(1, *veil))
        self.hazy = torch.lerp(lq, full, min(math.sqrt(share * wanted / max(_error(full, lq), 1e-9)), 0.9))
        self.facts.append(f"haze {share:.0%}")

    def picture(self) -> Tensor:
        h, w = self.lq.shape[-2:]
        seen = self.density[self.margin : self.margin + h, self.margin : self.margin + w]
        return torch.lerp(self.hazy, self.light.expand_as(self.hazy), 1 - torch.exp(-seen))

    def scattered(self, count: int) -> tuple[Tensor, Tensor]:
        """Places anywhere on the photo and its margin, (count, 1) each."""
        h, w = self.density.shape
        return self.draw(count, 0, h - 1)[:, None], self.draw(count, 0, w - 1)[:, None]

    def drop(self, y: Tensor, x: Tensor, weight: Tensor, sigma: float, peak: float) -> None:
        """Add points (n, k) of some weight, softened to `sigma` pixels and multiplied by `peak`."""
        self.density += peak * _softened(_splatted(y, x, weight, self.density.shape), sigma)


class _Rainfall(_Fall):
    # Relative to the middle distance: streaks, their length, softness in pixels, opacity.
    depths = ((60, 0.5, 0.45, 0.35), (26, 1.0, 0.6, 0.55), (5, 2.4, 1.0, 0.7))

    def __init__(self, rain: Rain, lq: Tensor, wanted: float, generator: torch.Generator) -> None:
        self.margin = math.ceil(0.5 * rain.length[1] * self.depths[-1][1]) + 4
        super().__init__(rain.veil, lq, wanted, generator)
        self.length = rain.length
        self.angle = float(self.draw(1, *rain.angle))
        self.facts.append(f"{self.angle:.0f} deg")

    def add(self, amount: float) -> None:
        for number, stretch, sigma, opacity in self.depths:
            count = self.count(amount * number, self.margin)
            y, x = self.scattered(count)
            length = self.draw(count, *self.length)[:, None] * stretch
            angle = torch.deg2rad(self.angle + self.draw(count, -2, 2))[:, None]
            places = torch.linspace(-0.5, 0.5, math.ceil(1.5 * self.length[1] * stretch) + 2)  # on a streak
            strength = -math.log1p(-opacity) * self.draw(count, 0.4, 1.2)[:, None] * (1 - (2 * places) ** 4)
            y, x = y + places * length * torch.cos(angle), x + places * length * torch.sin(angle)
            spread = math.sqrt(2 * math.pi * (sigma**2 + 0.2))  # of a line between pixels
            self.drop(y, x, strength * length / len(places), sigma, spread)


class _Snowfall(_Fall):
    # Relative to the middle distance: flakes, their radius, opacity.
    depths = ((60, 0.35, 0.75), (34, 0.6, 0.85), (14, 1.0, 0.85), (4, 1.9, 0.7), (1, 3.4, 0.5))
    specks = 9  # of a flake

    def __init__(self, snow: Snow, lq: Tensor, wanted: float, generator: torch.Generator) -> None:
        self.margin = math.ceil(4 * snow.size[1] * self.depths[-1][1]) + 2
        super().__init__(snow.veil, lq, wanted, generator)
        self.size = float(self.draw(1, *snow.size))
        self.drift = float(self.draw(1, -60, 60))
        self.facts += [f"flakes {self.size:.1f} px", f"{self.drift:.0f} deg"]

    def add(self, amount: float) -> None:
        for number, stretch, opacity in self.depths:
            count, radius = self.count(amount * number, self.margin), self.size * stretch
            y, x = self.scattered(count)
            within = 0.75 * radius * torch.randn(2, count, self.specks, generator=self.generator)
            angle = torch.deg2rad(self.drift + self.draw(count, -15, 15))[:, None]
            motion = radius * self.draw(count, 0, 2)[:, None] * torch.linspace(-0.5, 0.5, self.specks)
            y, x = y + within[0] + motion * torch.cos(angle), x + within[1] + motion * torch.sin(angle)
            sigma = 0.6 * radius
            strength = -math.log1p(-opacity) * self.draw(count, 0.5, 1.5)[:, None] / self.specks
            spread = 2 * math.pi * (sigma**2 + 0.5 * radius**2 + 0.2)  # of specks between pixels
            self.drop(y, x, strength.expand(-1, self.specks), sigma, 1.6 * spread)


class _WetPane(Painting):
    """Drops on the pane: how much of each pixel they cover, and what is seen through them there."""

    number = 6

    def __init__(self, drops: Raindrops, lq: Tensor, generator: torch.Generator) -> None:
        super().__init__(lq, generator)
        h, w = lq.shape[-2:]
        self.size = drops.size
        self.cover, self.shade, self.shine = (np.zeros((h, w), np.float32) for _ in range(3))
        self.source = np.zeros((h, w, 2), np.float32)  # x, y in pixels
        self.lens = float(self.draw(1, 2.5, 5.0))
        self.facts.append("0 drops")

    def add(self, amount: float) -> None:
        count = self.count(amount * self.number)
        self.facts[-1] = f"{int(self.facts[-1].split()[0]) + count} drops"
        low, high = (math.log(radius) for radius in self.size)
        for luck in torch.rand(count, 12, generator=self.generator).numpy():
            self._add_drop(luck, math.exp(low + (high - low) * float(luck[0]) ** 1.3))

    def _add_drop(self, luck: np.ndarray, radius: float) -> None:
        """One drop of about `radius` pixels; `luck` decides its place and shape."""
        h, w = self.cover.shape
        cy, cx = float(luck[1]) * h, float(luck[2]) * w
        tall = 1 + 0.35 * float(luck[3])
        reach = math.ceil(1.4 * radius * tall) + 2
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        place = np.s_[top : int(cy) + reach, left : int(cx) + reach]
        y, x = np.mgrid[top : min(h, int(cy) + reach), left : min(w, int(cx) + reach)].astype(np.float32)
        y, x = y - cy, x - cx
        angle = np.arctan2(y, x)
        wobble = sum((0.12 / n) * np.sin(n * angle + 6.28 * luck[4 + n]) for n in (1, 2, 3))
        # Gravity makes the lower half fuller than the upper one.
        rho = np.hypot(x * (1 + 0.12 * np.tanh(-y / radius)), y / tall) / (radius * (1 + wobble))
        cover = np.clip((1 - rho) * radius / 1.2 + 0.5, 0, 1)
        new = cover > 0.02
        old = self.cover[place]
        self.cover[place] = np.where(new, np.maximum(cover, old * (rho > 1)), old)
        self.source[place][new] = np.stack([cx - self.lens * x, cy - self.lens * y], 2)[new]
        self.shade[place][new] = (0.55 * np.clip(rho, 0, 1) ** 5)[new]
        spot = np.hypot(x + 0.3 * radius, y + 0.4 * radius) / (0.16 * radius)
        self.shine[place][new] = ((0.4 + 0.5 * luck[9]) * np.exp(-(spot**2)))[new]

    def picture(self) -> Tensor:
        h, w = self.lq.shape[-2:]
        blurred = F.avg_pool2d(self.lq[None], 2, ceil_mode=True, count_include_pad=False)
        size = torch.tensor([w, h], dtype=self.lq.dtype)
        grid = torch.from_numpy(self.source).to(self.lq) * 2 / size - 1
        seen = F.grid_sample(blurred, grid[None], padding_mode="reflection", align_corners=False)[0]
        cover, shade, shine = (torch.from_numpy(map_).to(self.lq) for map_ in (self.cover, self.shade, self.shine))
        seen = seen * (1 - shade)
        seen = seen + shine * (1 - seen)
        return torch.lerp(self.lq, seen, cover)


def _splatted(y: Tensor, x: Tensor, weight: Tensor, size: torch.Size) -> Tensor:
    """Points of some weight as an image, each shared by the four pixels around it; those outside are lost."""
    h, w = size
    top, left = y.floor(), x.floor()
    row = torch.stack([top, top, top + 1, top + 1])
    column = torch.stack([left, left + 1, left, left + 1])
    part = weight * (1 - (y - row).abs()) * (1 - (x - column).abs())
    place = (row.clamp(-1, h) + 1) * (w + 2) + column.clamp(-1, w) + 1  # a frame of one pixel takes what is outside
    total = torch.bincount(place.long().flatten(), part.flatten(), minlength=(h + 2) * (w + 2))
    return total.view(h + 2, w + 2)[1:-1, 1:-1].to(weight)


def _softened(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (h, w); for few taps sums of shifted images are faster than any convolution."""
    reach = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    for axis in (0, 1):
        n = image.shape[axis]
        padded = F.pad(image, (reach, reach) if axis else (0, 0, reach, reach))
        image = sum((tap * padded.narrow(axis, i, n) for i, tap in enumerate((taps / taps.sum()).tolist())), 0 * image)
    return image


def _error(image: Tensor, lq: Tensor) -> float:
    return float((image - lq).double().square().mean())


def _veiled(spoilt: Tensor, lq: Tensor, wanted: float) -> Tensor:
    """`spoilt` blended with the gray that is furthest from `lq`, until the squared error is enough."""
    gray = torch.full_like(lq, float(lq.mean() < 0.5))
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        enough = _error(torch.lerp(spoilt, gray, middle), lq) >= wanted
        low, high = (low, middle) if enough else (middle, high)
    return torch.lerp(spoilt, gray, high)
