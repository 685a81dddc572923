"""Photos of the real world: blur, resizing, noise and JPEG twice over, as Real-ESRGAN and Real-HAT are trained with."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.data.blur import filter2d, gaussian_kernel, sinc_kernel, usm
from zoo.data.degradations import Degradation, check_probability, check_range, happens, round8, uniform
from zoo.data.jpeg import diffjpeg
from zoo.errors import UserError

Range = tuple[float, float]
KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
MODES = ("area", "bilinear", "bicubic")
WAYS = ("up", "down", "keep")
_LARGE = 13  # side of a kernel from which on `sinc_cutoff_large` holds, pixels


@dataclass(frozen=True)
class RealWorld(Degradation):
    """Blur, resize, add noise and compress; the same again; a sinc filter and the final size before or after that JPEG.

    Names and defaults are those of the official recipes; a 2 at the end is the second round. Whatever these draw
    once a batch is drawn for every sample here, so that no pool of samples is needed. JPEG is the imitation of
    `zoo.data.jpeg.diffjpeg`. The result is rounded to 8 bits.

    Args:
        upscale: gt size over lq size.
        usm: degrade the image after unsharp masking; what a network is to learn is the objectives' `usm`.
        context: see `Degradation`; 36 makes 100 pixels of a crop of 64, as the official 400 of 256 at upscale 4.
        kernel_size: smallest and largest side of all kernels, odd, pixels.
        sinc_cutoff: of sinc kernels below 13 pixels, radians per pixel.
        sinc_cutoff_large: of the others.
        kernel_angle: of the first axis of aniso kernels, radians.
        sinc_prob: probability of a sinc kernel.
        kernel_prob: shares of KINDS among the others.
        blur_sigma: standard deviation along each axis, pixels.
        betag_range: exponent of generalized kernels; half of them are drawn below 1 and half above.
        betap_range: the same of plateau kernels.
        blur_prob: probability of any blur; the second is the official `second_blur_prob`.
        resize_prob: shares of enlarging, shrinking and keeping the size.
        resize_range: smallest and largest factor; in the second round of the final size.
        gaussian_noise_prob: probability of Gaussian noise; it is Poisson noise otherwise.
        noise_range: standard deviation of Gaussian noise, 8-bit levels.
        poisson_scale_range: factor on Poisson noise.
        gray_noise_prob: probability that all channels get the same noise.
        jpeg_range: quality.
        sinc_prob2: as `sinc_prob`, and so on.
        kernel_prob2: see above.
        blur_sigma2: see above.
        betag_range2: see above.
        betap_range2: see above.
        blur_prob2: see above.
        resize_prob2: see above.
        resize_range2: see above.
        gaussian_noise_prob2: see above.
        noise_range2: see above.
        poisson_scale_range2: see above.
        gray_noise_prob2: see above.
        jpeg_range2: see above.
        resize_modes: those of MODES that every resizing draws from.
        final_sinc_prob: probability of the final sinc filter.
        final_sinc_cutoff: its cutoff, radians per pixel.
        final_jpeg_last_prob: probability that the second JPEG comes after the final size and sinc filter.

    Source: Wang et al. 2021 (Real-ESRGAN), section 3; hat/models/realhatgan_model.py, hat/data/realesrgan_dataset.py.
    """

    upscale: int = 4
    usm: bool = True
    context: int = 36  # pyright: ignore[reportIncompatibleVariableOverride]
    kernel_size: tuple[int, int] = (7, 21)
    sinc_cutoff: Range = (math.pi / 3, math.pi)
    sinc_cutoff_large: Range = (math.pi / 5, math.pi)
    kernel_angle: Range = (-math.pi, math.pi)
    sinc_prob: float = 0.1
    kernel_prob: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    blur_sigma: Range = (0.2, 3.0)
    betag_range: Range = (0.5, 4.0)
    betap_range: Range = (1.0, 2.0)
    blur_prob: float = 1.0
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize_range: Range = (0.15, 1.5)
    gaussian_noise_prob: float = 0.5
    noise_range: Range = (1.0, 30.0)
    poisson_scale_range: Range = (0.05, 3.0)
    gray_noise_prob: float = 0.4
    jpeg_range: Range = (30.0, 95.0)
    sinc_prob2: float = 0.1
    kernel_prob2: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    blur_sigma2: Range = (0.2, 1.5)
    betag_range2: Range = (0.5, 4.0)
    betap_range2: Range = (1.0, 2.0)
    blur_prob2: float = 0.8
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize_range2: Range = (0.3, 1.2)
    gaussian_noise_prob2: float = 0.5
    noise_range2: Range = (1.0, 25.0)
    poisson_scale_range2: Range = (0.05, 2.5)
    gray_noise_prob2: float = 0.4
    jpeg_range2: Range = (30.0, 95.0)
    resize_modes: tuple[str, ...] = MODES
    final_sinc_prob: float = 0.8
    final_sinc_cutoff: Range = (math.pi / 3, math.pi)
    final_jpeg_last_prob: float = 0.5

    _LIMITS: ClassVar = {
        "sinc_cutoff": (1e-3, math.pi),
        "sinc_cutoff_large": (1e-3, math.pi),
        "final_sinc_cutoff": (1e-3, math.pi),
        "kernel_angle": (-math.pi, math.pi),
        "kernel_size": (3, 51),
        "blur_sigma": (1e-2, 50),
        "betag_range": (1e-2, 50),
        "betap_range": (1e-2, 50),
        "resize_range": (1e-2, 16),
        "noise_range": (0, 255),
        "poisson_scale_range": (0, 100),
        "jpeg_range": (1, 100),
    }

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.upscale < 1 or self.context < 0:
            raise UserError(
                f"RealWorld: upscale must be at least 1 and context at least 0, got {self.upscale} and {self.context}"
            )
        if any(size % 2 == 0 for size in self.kernel_size):
            raise UserError(f"RealWorld: kernel_size must be two odd numbers, got {self.kernel_size}")
        if not self.resize_modes or not set(self.resize_modes) <= set(MODES):
            raise UserError(f"RealWorld: resize_modes must be some of {', '.join(MODES)}, got {self.resize_modes}")
        for name, value in vars(self).items():
            plain = name.removesuffix("2")
            if plain in self._LIMITS:
                check_range(f"RealWorld: {name}", value, *self._LIMITS[plain])
            elif plain in ("kernel_prob", "resize_prob"):
                if min(value) < 0 or not sum(value):
                    raise UserError(f"RealWorld: {name} must be shares of at least 0, not all 0, got {value}")
            elif plain.endswith("_prob"):
                check_probability(f"RealWorld: {name}", value)

    def told(self, lq: Tensor, generator: torch.Generator) -> tuple[Tensor, list[str]]:
        """Degrade and shrink (c, h, w); bottom and right are cut to a multiple of `upscale` first."""
        h, w = (n // self.upscale for n in lq.shape[-2:])
        reach = self.kernel_size[1] // 2
        if min(min(lq.shape[-2:]) * min(self.resize_range[0], 1), h, w) - 1 < reach:
            raise UserError(
                f"RealWorld: an image of {lq.shape[-1]}x{lq.shape[-2]} shrinks to less than half of the "
                f"{self.kernel_size[1]}-pixel kernels; enlarge patch_size or context, or the lower end of resize_range"
            )
        x = lq[None, :, : h * self.upscale, : w * self.upscale]  # b c h w
        x = usm(x) if self.usm else x
        facts: list[str] = []
        x = self._blurred(x, "", facts, generator)
        factor = self._factor("", facts, generator)
        x = F.interpolate(x, scale_factor=factor, mode=self._mode(facts, generator))
        x = self._compressed(self._noisy(x, "", facts, generator), "", facts, generator)
        x = self._blurred(x, "2", facts, generator)
        factor = self._factor("2", facts, generator)
        x = F.interpolate(x, (int(h * factor), int(w * factor)), mode=self._mode(facts, generator))
        x = self._noisy(x, "2", facts, generator)
        if happens(self.final_jpeg_last_prob, generator):
            x = self._compressed(self._finished(x, (h, w), facts, generator), "2", facts, generator)
        else:
            x = self._finished(self._compressed(x, "2", facts, generator), (h, w), facts, generator)
        return round8(x[0]), facts

    def _blurred(self, x: Tensor, turn: str, facts: list[str], generator: torch.Generator) -> Tensor:
        if not happens(getattr(self, f"blur_prob{turn}"), generator):
            return x
        size = self._size(generator)
        if happens(getattr(self, f"sinc_prob{turn}"), generator):
            cutoff = uniform(self.sinc_cutoff if size < _LARGE else self.sinc_cutoff_large, generator)
            facts.append(f"sinc {size} px {cutoff:.2f}")
            return self._filtered(x, sinc_kernel(size, cutoff))
        kind = _pick(KINDS, getattr(self, f"kernel_prob{turn}"), generator)
        sigmas = [uniform(getattr(self, f"blur_sigma{turn}"), generator) for _ in range(2)]
        angle = uniform(self.kernel_angle, generator)
        shape, _, form = kind.rpartition("_")
        beta = 1.0
        if shape:
            low, high = getattr(self, f"beta{shape[0]}_range{turn}")
            beta = uniform((low, 1) if happens(0.5, generator) else (1, high), generator)
        first, second = (sigmas[0], sigmas[0]) if form == "iso" else sigmas
        said = f"{first:.2f}" if form == "iso" else f"{first:.2f} x {second:.2f}"
        facts.append(f"{kind} {size} px {said}" + (f" beta {beta:.2f}" if shape else ""))
        return self._filtered(x, gaussian_kernel(size, first, second, angle, beta=beta, plateau=shape == "plateau"))

    def _factor(self, turn: str, facts: list[str], generator: torch.Generator) -> float:
        """Of a resizing; drawn also where it is 1, so that later choices do not depend on it."""
        way = _pick(WAYS, getattr(self, f"resize_prob{turn}"), generator)
        low, high = getattr(self, f"resize_range{turn}")
        factor = {"up": uniform((1, high), generator), "down": uniform((low, 1), generator), "keep": 1.0}[way]
        facts.append(f"x{factor:.2f}")
        return factor

    def _mode(self, facts: list[str], generator: torch.Generator) -> str:
        mode = _pick(self.resize_modes, [1.0] * len(self.resize_modes), generator)
        facts[-1] += f" {mode}"
        return mode

    def _noisy(self, x: Tensor, turn: str, facts: list[str], generator: torch.Generator) -> Tensor:
        gaussian = happens(getattr(self, f"gaussian_noise_prob{turn}"), generator)
        gray = happens(getattr(self, f"gray_noise_prob{turn}"), generator)
        strength = uniform(getattr(self, f"{'noise' if gaussian else 'poisson_scale'}_range{turn}"), generator)
        facts.append(f"{'gray ' * gray}{'gaussian' if gaussian else 'poisson'} {strength:.1f}")
        draw = gaussian_noise if gaussian else poisson_noise
        return (x + draw(x, strength, gray, generator)).clamp(0, 1)

    def _compressed(self, x: Tensor, turn: str, facts: list[str], generator: torch.Generator) -> Tensor:
        quality = uniform(getattr(self, f"jpeg_range{turn}"), generator)
        facts.append(f"jpeg {quality:.0f}")
        return diffjpeg(x.clamp(0, 1), quality)

    def _finished(self, x: Tensor, size: tuple[int, int], facts: list[str], generator: torch.Generator) -> Tensor:
        facts.append("to size")
        x = F.interpolate(x, size, mode=self._mode(facts, generator))
        if not happens(self.final_sinc_prob, generator):
            return x
        side, cutoff = self._size(generator), uniform(self.final_sinc_cutoff, generator)
        facts.append(f"sinc {side} px {cutoff:.2f}")
        return self._filtered(x, sinc_kernel(side, cutoff))

    def _size(self, generator: torch.Generator) -> int:
        low, high = (size // 2 for size in self.kernel_size)
        return 2 * int(torch.randint(low, high + 1, (), generator=generator)) + 1

    def _filtered(self, x: Tensor, kernel: Tensor) -> Tensor:
        margin = (self.kernel_size[1] - len(kernel)) // 2  # large kernels are the fast ones of filter2d
        return filter2d(x, F.pad(kernel, (margin,) * 4))


def gaussian_noise(x: Tensor, sigma: float, gray: bool, generator: torch.Generator) -> Tensor:
    """White noise.

    Args:
        x: (b, c, h, w) that it is for.
        sigma: standard deviation, 8-bit levels.
        gray: the same in all channels.
        generator: of its numbers.

    Returns:
        (b, c, h, w), or (b, 1, h, w) if gray.
    """
    return torch.randn(_shape(x, gray), generator=generator, dtype=x.dtype) * (sigma / 255)


def poisson_noise(x: Tensor, scale: float, gray: bool, generator: torch.Generator) -> Tensor:
    """Noise of counting light: with 2^n steps of brightness, enough for all that occur in the image, its variance is
    scale^2 * brightness / 2^n.

    Args:
        x: (1, c, h, w) in [0, 1].
        scale: factor on the noise.
        gray: the same in all channels, by the luma.
        generator: of its numbers.

    Returns:
        (1, c, h, w), or (1, 1, h, w) if gray.

    Source: basicsr/data/degradations.py (generate_poisson_noise_pt).
    """
    if gray and x.shape[1] == 3:
        x = (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    levels = (x.clamp(0, 1) * 255).round()
    occurring = int((torch.bincount(levels.long().flatten(), minlength=256) > 0).sum())
    steps = 2 ** (occurring - 1).bit_length()
    clean = levels / 255
    return (torch.poisson(clean * steps, generator=generator) / steps - clean) * scale


def _shape(x: Tensor, gray: bool) -> tuple[int, ...]:
    return (len(x), 1 if gray else x.shape[1], *x.shape[2:])


def _pick(names: tuple[str, ...], shares: tuple[float, ...] | list[float], generator: torch.Generator) -> str:
    return names[int(torch.multinomial(torch.tensor(shares, dtype=torch.float64), 1, generator=generator))]
