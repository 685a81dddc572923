"""PSNR, SSIM and PSNR-B as the restoration papers report them: the numbers of BasicSR, with the protocol said aloud.

Order for one image: clamp to [0, 1], times 255, round half to even, crop, Y if asked for, then float64 arithmetic.
Source: basicsr/metrics/psnr_ssim.py; PSNR-B: Yim & Bovik 2011 as in SwinIR's tests.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zoo.errors import UserError

Image = Tensor | np.ndarray
_TAPS, _SIGMA = 11, 1.5  # SSIM's Gaussian window


def psnr(restored: Image, gt: Image, *, crop_border: int = 0, y_channel: bool = False, quantize: bool = True) -> float:
    """Peak signal-to-noise ratio in dB.

    Args:
        restored: (c, h, w) or (b, c, h, w), c = 1 or 3 (RGB), floating in [0, 1] or uint8.
        gt: the same shape.
        crop_border: pixels left out on all four sides; the upscale for super-resolution, 0 otherwise.
        y_channel: compare BT.601 luma (16 to 235, unrounded) of colour images; gray ones are taken as they are.
        quantize: round to 8 bits first. False is BasicSR's tensor variant: no clamp, 1e-8 added to the error
            (so at most 80 dB).

    Returns:
        The value, of a batch the mean of the values of its images; inf for identical images when quantising.

    Raises:
        ValueError: shapes differ, or nothing is left after cropping.
    """
    restored, gt = _prepared("psnr", restored, gt, crop_border, y_channel, quantize)
    error = (restored - gt).square().mean((1, 2, 3)) / 255**2
    return _mean_db(error if quantize else error + 1e-8)


def ssim(restored: Image, gt: Image, *, crop_border: int = 0, y_channel: bool = False, quantize: bool = True) -> float:
    """Structural similarity: 11x11 Gaussian window of sigma 1.5, fully covered positions only, mean over channels.

    Args:
        restored: as for `psnr`.
        gt: as for `psnr`.
        crop_border: as for `psnr`.
        y_channel: as for `psnr`.
        quantize: as for `psnr`, without the added error.

    Returns:
        The value, at most 1; of a batch the mean over its images.

    Raises:
        ValueError: shapes differ, or nothing is left after cropping.
        UserError: fewer than 11 pixels a side are left, where SSIM has no value.
    """
    restored, gt = _prepared("ssim", restored, gt, crop_border, y_channel, quantize)
    h, w = gt.shape[-2:]
    if min(h, w) < _TAPS:
        raise UserError(
            f"ssim: an image of {w}x{h} after cropping has no SSIM, which needs {_TAPS} pixels a side; leave it out"
        )
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = _blurred(restored), _blurred(gt)
    var_a = _blurred(restored.square()) - mean_a.square()
    var_b = _blurred(gt.square()) - mean_b.square()
    covariance = _blurred(restored * gt) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    contrast = (2 * covariance + c2) / (var_a + var_b + c2)
    return float((luminance * contrast).mean())


def psnr_b(
    restored: Image, gt: Image, *, crop_border: int = 0, y_channel: bool = False, quantize: bool = True
) -> float:
    """PSNR whose error also counts visible 8x8 block edges of `restored`, for JPEG artefact removal.

    Error + eta max(0, D_b - D_nb): mean squared differences of neighbours across and not across block edges,
    eta = log2(8) / log2(min(h, w)). Colour images: mean of the three channels' values.

    Args:
        restored: as for `psnr`.
        gt: as for `psnr`.
        crop_border: as for `psnr`; blocks are counted from the first pixel that is left.
        y_channel: as for `psnr`.
        quantize: as for `psnr`, without the added error.

    Returns:
        dB, of a batch the mean over its images.

    Raises:
        ValueError: shapes differ, or nothing is left after cropping.
        UserError: no block edge is left.
    """
    restored, gt = _prepared("psnr_b", restored, gt, crop_border, y_channel, quantize)
    h, w = gt.shape[-2:]
    if min(h, w) <= 8:
        raise UserError(f"psnr_b: an image of {w}x{h} after cropping holds no block edge; leave it out")
    rows, columns = restored.diff(dim=2).square(), restored.diff(dim=3).square()
    edge_rows, edge_columns = rows[:, :, 7::8], columns[:, :, :, 7::8]
    totals = [t.sum((2, 3)) for t in (edge_rows, edge_columns, rows, columns)]
    edges = edge_rows[0, 0].numel() + edge_columns[0, 0].numel()
    across = (totals[0] + totals[1]) / edges
    inside = (totals[2] + totals[3] - totals[0] - totals[1]) / (rows[0, 0].numel() + columns[0, 0].numel() - edges)
    blocking = math.log2(8) / math.log2(min(h, w)) * (across - inside).clamp(min=0)
    return _mean_db(((restored - gt).square().mean((2, 3)) + blocking) / 255**2)


def rgb_to_y(x: Tensor) -> Tensor:
    """BT.601 studio-range luma, as MATLAB's rgb2ycbcr without its rounding.

    Args:
        x: (..., 3, h, w) RGB in [0, 1].

    Returns:
        (..., 1, h, w) in units of 8-bit levels, 16 to 235, dtype of `x`.
    """
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64, device=x.device)
    return (torch.einsum("...chw,c->...hw", x.double(), weights) + 16)[..., None, :, :].to(x.dtype)


def eight_bit(image: Tensor) -> Tensor:
    """What an 8-bit file holds of an image: clamped to [0, 1], times 255, rounded half to even. uint8 as it is."""
    return image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass(frozen=True)
class Protocol:
    """How a number was measured; it is printed beside every one.

    Args:
        crop_border: see `psnr`.
        y_channel: see `psnr`.
        quantize: see `psnr`.
    """

    crop_border: int = 0
    y_channel: bool = False
    quantize: bool = True

    def label(self, metric: str = "PSNR") -> str:
        """Name of the number, such as "PSNR-Y, crop 2, uint8"."""
        space, numbers = "Y" if self.y_channel else "RGB", "uint8" if self.quantize else "float"
        return f"{metric}-{space}, crop {self.crop_border}, {numbers}"

    def __str__(self) -> str:
        """The label of PSNR."""
        return self.label()

    def psnr(self, restored: Image, gt: Image) -> float:
        """`psnr` by this protocol."""
        return self._measure(psnr, restored, gt)

    def ssim(self, restored: Image, gt: Image) -> float:
        """`ssim` by this protocol."""
        return self._measure(ssim, restored, gt)

    def psnr_b(self, restored: Image, gt: Image) -> float:
        """`psnr_b` by this protocol."""
        return self._measure(psnr_b, restored, gt)

    def _measure(self, metric: Callable[..., float], restored: Image, gt: Image) -> float:
        return metric(restored, gt, crop_border=self.crop_border, y_channel=self.y_channel, quantize=self.quantize)


def _prepared(
    name: str, restored: Image, gt: Image, crop: int, y_channel: bool, quantize: bool
) -> tuple[Tensor, Tensor]:
    """Both images as float64 (b, c, h, w) in 8-bit levels, cropped, in the colour space to compare."""
    if tuple(restored.shape) != tuple(gt.shape) or restored.ndim not in (3, 4) or restored.shape[-3] not in (1, 3):
        raise ValueError(
            f"{name}: both images must be (c, h, w) or (b, c, h, w) with 1 or 3 channels, "
            f"got {tuple(restored.shape)} and {tuple(gt.shape)}"
        )
    h, w = gt.shape[-2:]
    if crop < 0 or min(h, w) <= 2 * crop:
        raise ValueError(f"{name}: crop_border must leave a pixel of {h}x{w}, got {crop}")
    return _levels(restored, crop, y_channel, quantize), _levels(gt, crop, y_channel, quantize)


def _levels(x: Image, crop: int, y_channel: bool, quantize: bool) -> Tensor:
    x = torch.as_tensor(x).detach()
    x = x if x.ndim == 4 else x[None]
    x = x[..., crop : x.shape[-2] - crop, crop : x.shape[-1] - crop]
    if x.dtype == torch.uint8:
        levels = x.double()
    else:
        x = x if x.dtype == torch.float64 else x.float()  # times 255 in the image's own precision, as BasicSR does
        levels = (x.clamp(0, 1) * 255).round().double() if quantize else x.double() * 255
    return rgb_to_y(levels / 255) if y_channel and x.shape[1] == 3 else levels


def _blurred(x: Tensor) -> Tensor:
    """Gaussian mean of (b, c, h, w) over fully covered 11x11 windows."""
    t = torch.arange(_TAPS, dtype=x.dtype, device=x.device) - _TAPS // 2
    taps = torch.exp(-(t**2) / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    for dim in (2, 3):  # shifted sums: torch's float64 convolution is ten times as slow
        size = x.shape[dim] - _TAPS + 1
        total = torch.zeros_like(x.narrow(dim, 0, size))
        for place, weight in enumerate(taps.tolist()):
            total.add_(x.narrow(dim, place, size), alpha=weight)
        x = total
    return x


def _mean_db(error: Tensor) -> float:
    """Mean of -10 log10 over all given errors (already relative to the squared peak)."""
    return float((-10 * torch.log10(error)).mean())
