"""What is measured of a restored image, and by which protocol: PSNR and SSIM in both colour spaces, LPIPS."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo import shipped
from zoo.data.layouts import same_set
from zoo.errors import UserError, nearest
from zoo.metrics import lpips
from zoo.metrics.psnr_ssim import Image, Protocol, eight_bit, rgb_to_y

PROTOCOLS = ("basicsr", "rgb", "matlab", "histoformer")
_TAPS = 11  # of the histoformer protocol's SSIM


@dataclass(frozen=True)
class MatlabProtocol(Protocol):
    """As old MATLAB tables: luma is rounded to 8 bits before the comparison, which moves PSNR by hundredths of a dB."""

    def label(self, metric: str = "PSNR") -> str:
        """Name of the number, such as "PSNR-Y rounded, crop 2, uint8"."""
        return f"{metric}-Y rounded, crop {self.crop_border}, uint8"

    def __str__(self) -> str:
        """The label of PSNR."""
        return self.label()

    def psnr(self, restored: Image, gt: Image) -> float:
        """PSNR of the rounded lumas."""
        return Protocol(self.crop_border).psnr(_rounded_luma(restored), _rounded_luma(gt))

    def ssim(self, restored: Image, gt: Image) -> float:
        """SSIM of the rounded lumas."""
        return Protocol(self.crop_border).ssim(_rounded_luma(restored), _rounded_luma(gt))


@dataclass(frozen=True)
class SwappedProtocol(Protocol):
    """As Histoformer's tables: luma whose red and blue have each other's weights, compared at a range of 1.

    Luma spans 219 of 255 levels there, and SSIM has a uniform window of 11 pixels, as scikit-image's.
    Source: sunshangquan/Histoformer Allweather/compute_psnr.py.
    """

    def label(self, metric: str = "PSNR") -> str:
        """Name of the number, such as "PSNR-Y of BGR, crop 0, uint8"."""
        return f"{metric}-Y of BGR, crop {self.crop_border}, uint8"

    def __str__(self) -> str:
        """The label of PSNR."""
        return self.label()

    def psnr(self, restored: Image, gt: Image) -> float:
        """PSNR of the swapped lumas."""
        error = (_swapped_luma(restored) - _swapped_luma(gt)).square().mean()
        return float(-10 * error.log10())

    def ssim(self, restored: Image, gt: Image) -> float:
        """SSIM of the swapped lumas, variances of samples."""
        a, b = _swapped_luma(restored), _swapped_luma(gt)
        if min(a.shape[1:]) < _TAPS:
            raise UserError(f"ssim: images need {_TAPS} pixels a side; leave smaller ones out")
        mean_a, mean_b, mean_aa, mean_bb, mean_ab = (F.avg_pool2d(x, _TAPS, 1) for x in (a, b, a * a, b * b, a * b))
        sample = _TAPS**2 / (_TAPS**2 - 1)
        spread = sample * (mean_aa - mean_a**2 + mean_bb - mean_b**2)
        covariance = sample * (mean_ab - mean_a * mean_b)
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        return float((luminance * (2 * covariance + 0.03**2) / (spread + 0.03**2)).mean())


def protocol_of(name: str, upscale: int) -> Protocol:
    """The protocol that a word of PROTOCOLS means.

    Raises:
        UserError: it is none.
    """
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} is not one of {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}")
    border = upscale if upscale > 1 else 0
    if name == "matlab":
        return MatlabProtocol(border, y_channel=True)
    if name == "histoformer":
        return SwappedProtocol(y_channel=True)
    return Protocol(border, y_channel=name == "basicsr" and upscale > 1)


@dataclass(frozen=True)
class Measured:
    """What one image scored.

    Attributes:
        psnr: by the protocol, dB.
        ssim: by the protocol; None below 11 pixels a side.
        also: the further measures by their key; None where the image is too small or a file is missing.
    """

    psnr: float
    ssim: float | None
    also: dict[str, float | None] = field(default_factory=dict)


class Judge:
    """Measures images by a protocol, and beside it in the other colour space and by LPIPS.

    Args:
        protocol: of the two main numbers.
        channels: of the images; gray ones have no other colour space.
        lpips_file: as for `zoo.metrics.lpips.load`; None = AlexNet where torch.hub keeps it.

    Attributes:
        labels: key of each further measure -> its name with its protocol.
        missing: key -> why it has no value here.

    Raises:
        UserError: the file for LPIPS was named and cannot be used.
    """

    def __init__(self, protocol: Protocol, *, channels: int = 3, lpips_file: str | Path | None = None) -> None:
        self.protocol = protocol
        self.labels: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self._other: tuple[str, Protocol] | None = None
        if channels == 3:
            self._other = "rgb" if protocol.y_channel else "y", _other(protocol)
            self.labels = {f"{name}_{self._other[0]}": self._other[1].label(name.upper()) for name in ("psnr", "ssim")}
        try:
            self._lpips = lpips.load(lpips_file)
        except FileNotFoundError as error:
            self._lpips = None
            self.missing["lpips"] = str(error)
        kind = f" ({self._lpips.kind}, version 0.1)" if self._lpips else ""
        self.labels["lpips"] = f"LPIPS{kind}, RGB, crop {protocol.crop_border}, uint8"

    def __call__(self, name: str, restored: Tensor, gt: Tensor) -> Measured:
        """Measure one image, (c, h, w) in [0, 1].

        Raises:
            UserError: nothing is left of it after cropping.
        """
        border = self.protocol.crop_border
        if min(restored.shape[1:]) <= 2 * border:
            raise UserError(f"{name}: nothing is left of {gt.shape[2]}x{gt.shape[1]} after cropping; remove it")
        psnr, ssim = _both(self.protocol, restored, gt)
        also: dict[str, float | None] = {}
        if self._other is not None:
            key, protocol = self._other
            also |= dict(zip((f"psnr_{key}", f"ssim_{key}"), _both(protocol, restored, gt), strict=True))
        also["lpips"] = self._lpips.between(restored, gt, crop_border=border) if self._lpips else None
        return Measured(psnr, ssim, also)


def recorded(model: str) -> list[str]:
    """What checkpoints/index.yaml has of a variant: the paper's figures and ours; one phrase each."""
    row = shipped.index().get(model, {})
    paper = [f"paper: {where} {value}" for where, value in (row.get("paper") or {}).items()]
    return paper + [f"{where}: {value}" for where, value in (row.get("figures") or {}).items()]


def paper_figure(variant: str | None, data: str, label: str) -> str | None:
    """The authors' figure for a variant on a set by one protocol, such as "33.04 dB"; None where none is recorded.

    Args:
        variant: such as "hat-x4".
        data: the set's folder or name; letter case and the usual aliases do not matter.
        label: of the protocol, such as "PSNR-Y, crop 4, uint8".
    """
    figures = (shipped.index().get(variant or "", {}).get("paper") or {}).items()
    return next(
        (
            str(value)
            for where, value in figures
            if where.endswith(f" {label}") and same_set(where.removesuffix(f" {label}"), Path(data).name)
        ),
        None,
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _other(protocol: Protocol) -> Protocol:
    """The same in RGB instead of Y, or the other way round."""
    if isinstance(protocol, MatlabProtocol | SwappedProtocol):
        return Protocol(protocol.crop_border)
    return replace(protocol, y_channel=not protocol.y_channel)


def _both(protocol: Protocol, restored: Tensor, gt: Tensor) -> tuple[float, float | None]:
    psnr = protocol.psnr(restored, gt)
    try:
        return psnr, protocol.ssim(restored, gt)
    except UserError:  # smaller than its window
        return psnr, None


def _rounded_luma(image: Image) -> Tensor:
    """uint8 (1, h, w); a gray image as it is."""
    levels = eight_bit(torch.as_tensor(image))
    return rgb_to_y(levels.double() / 255).round().to(torch.uint8) if levels.shape[0] == 3 else levels


def _swapped_luma(image: Image) -> Tensor:
    """float64 (1, h, w), 16/255 to 235/255; of a gray image the same as of one with three such channels."""
    levels = eight_bit(torch.as_tensor(image)).double() / 255
    return rgb_to_y(levels.flip(0).expand(3, -1, -1)) / 255
