"""Blur kernels of real-world degradation models, per-sample filtering and unsharp masking."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.errors import UserError

_DIRECT = 11  # side of the largest kernel that is summed; a CPU filters with larger ones up to 18 times as fast by FFT


def gaussian_kernel(
    size: int,
    sigma_x: float,
    sigma_y: float | None = None,
    theta: float = 0.0,
    *,
    beta: float = 1.0,
    plateau: bool = False,
) -> Tensor:
    """Bell-shaped kernel: exp(-q^beta / 2), or 1 / (1 + q^beta) as a plateau, of the form q of an ellipse.

    Args:
        size: side in pixels, odd.
        sigma_x: standard deviation along the first axis of the ellipse, in pixels.
        sigma_y: the same for the second axis; None = a circle.
        theta: angle of the first axis, in radians from x towards y.
        beta: 1 = Gaussian, smaller = longer tails, larger = boxier.
        plateau: take the second formula.

    Returns:
        (size, size) float64, sum 1.

    Source: basicsr/data/degradations.py (bivariate Gaussian, generalized Gaussian, plateau).
    """
    if size < 1 or size % 2 == 0 or sigma_x <= 0 or (sigma_y is not None and sigma_y <= 0):
        raise ValueError(f"gaussian_kernel: size must be odd, sigmas positive, got {size}, {sigma_x}, {sigma_y}")
    sigma_y = sigma_x if sigma_y is None else sigma_y
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    x, y = axis[None, :], axis[:, None]
    along = x * math.cos(theta) + y * math.sin(theta)
    across = y * math.cos(theta) - x * math.sin(theta)
    q = ((along / sigma_x) ** 2 + (across / sigma_y) ** 2) ** beta
    kernel = 1 / (1 + q) if plateau else torch.exp(-q / 2)
    return kernel / kernel.sum()


def sinc_kernel(size: int, cutoff: float, pad_to: int = 0) -> Tensor:
    """Circular low-pass filter, whose ringing imitates sharpening: cutoff J1(cutoff r) / (2 pi r).

    Args:
        size: side in pixels, odd.
        cutoff: angular frequency in radians per pixel, at most pi.
        pad_to: side of the result, zeros around; 0 = `size`.

    Returns:
        (side, side) float64, sum 1.

    Source: basicsr/data/degradations.py (circular_lowpass_kernel).
    """
    if size < 1 or size % 2 == 0 or not 0 < cutoff <= math.pi:
        raise ValueError(f"sinc_kernel: size must be odd and cutoff in (0, pi], got {size}, {cutoff}")
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    r = torch.hypot(axis[:, None], axis[None, :])
    safe = r.clamp(min=1e-9)
    kernel = cutoff * _bessel_j1(cutoff * safe) / (2 * math.pi * safe)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    kernel = kernel / kernel.sum()
    extra = max(0, pad_to - size) // 2
    return F.pad(kernel, (extra, extra, extra, extra))


def _bessel_j1(x: Tensor) -> Tensor:
    """J1 as the mean of cos(t - x sin t) over a circle: exact to rounding; torch's own is off by 4e-7 in float64."""
    count = 64 + 2 * math.ceil(float(x.max()))
    t = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return torch.cos(t - x[..., None] * torch.sin(t)).mean(-1)


def filter2d(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlate every channel with a kernel, borders reflected (edge pixel not repeated).

    Args:
        x: (b, c, h, w).
        kernel: (k, k) for all samples, or (b, k, k); k odd.

    Returns:
        (b, c, h, w).

    Raises:
        ValueError: shapes disagree, or the image is not larger than half the kernel.
    """
    b, _, h, w = x.shape
    k = kernel.shape[-1]
    if kernel.shape not in ((k, k), (1, k, k), (b, k, k)) or k % 2 == 0:
        raise ValueError(f"filter2d: kernel must be (k, k) or ({b}, k, k) with odd k, got {tuple(kernel.shape)}")
    if min(h, w) <= k // 2:
        raise ValueError(f"filter2d: an image for a {k}-pixel kernel must be larger than {k // 2}, got {h}x{w}")
    padded = F.pad(x, (k // 2,) * 4, mode="reflect")
    each = kernel.to(x).expand(b, k, k)[:, None]  # b 1 k k
    if k <= _DIRECT:
        return F.conv2d(padded.transpose(0, 1), each, groups=b).transpose(0, 1)
    size = [-(-n // 16) * 16 for n in padded.shape[-2:]]  # sizes with large prime factors are slow
    spectrum = torch.fft.rfft2(padded, size) * torch.fft.rfft2(each, size).conj()
    return torch.fft.irfft2(spectrum, size)[..., :h, :w]


def usm(x: Tensor, weight: float = 0.5, radius: int = 50, threshold: float = 10.0) -> Tensor:
    """Unsharp masking: add `weight` of what a wide blur removes, blended in where that is visible.

    Args:
        x: (b, c, h, w) in [0, 1].
        weight: share of the residual that is added.
        radius: side of the blur in pixels, made odd; sigma follows from it (8 for 51).
        threshold: residual, in 8-bit levels, above which a pixel counts as an edge.

    Returns:
        (b, c, h, w) in [0, 1].

    Raises:
        UserError: a side is not above half the radius.

    Source: basicsr/utils/img_process_util.py (USMSharp).
    """
    size = radius + 1 - radius % 2
    if min(x.shape[-2:]) <= size // 2:
        h, w = x.shape[-2:]
        raise UserError(
            f"usm: sides must be above {size // 2} pixels for radius {radius}, got {h}x{w}; enlarge the crop"
        )
    kernel = gaussian_kernel(size, 0.3 * ((size - 1) * 0.5 - 1) + 0.8)
    residual = x - filter2d(x, kernel)
    soft = filter2d((residual.abs() * 255 > threshold).to(x.dtype), kernel)
    sharp = (x + weight * residual).clamp(0, 1)
    return soft * sharp + (1 - soft) * x
