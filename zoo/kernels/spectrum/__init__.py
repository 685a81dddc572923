"""The two-dimensional Fourier transform of real images: coefficients, amplitude or phase, and masks by frequency.

For an image x of h rows and w columns, with factor 1 (norm "backward") or 1 / sqrt(h w) ("ortho"):

    X[u, v] = factor sum_yx x[y, x] exp(-2 pi i (u y / h + v x / w))        0 <= u < h, 0 <= v <= w // 2

The other columns are conjugates of these. Computed in float32 or wider, whatever the dtype.

Source: torch.fft.rfft2 and irfft2, which answer on every device.
"""

import torch
from torch import Tensor

from zoo.kernels.impls import pick

from .masks import radial_mask

__all__ = ["inverse_spectrum", "radial_mask", "spectrum"]

PARTS = ("complex", "amplitude", "phase")
NORMS = ("ortho", "backward")


def spectrum(x: Tensor, *, part: str = "complex", norm: str = "ortho", impl: str = "auto") -> Tensor:
    """Transform the last two axes. Differentiable, any number of times; where a coefficient is 0, with gradient 0.

    Args:
        x: real images, (..., h, w), both at least 1.
        part: "complex" coefficients, their "amplitude" (magnitude), or their "phase" in (-pi, pi].
        norm: "ortho" keeps energy, "backward" leaves the sums as they are.
        impl: "reference", "torch", or "auto" (torch).

    Returns:
        (..., h, w // 2 + 1), complex or real, of float32 or wider. `torch.polar` joins amplitude and phase.

    Raises:
        ValueError: shape, dtype or option.
    """
    if x.ndim < 2 or not x.is_floating_point() or min(x.shape[-2:]) < 1:
        raise ValueError(f"spectrum: x must be float (..., h, w), each at least 1, got {tuple(x.shape)} {x.dtype}")
    if part not in PARTS:
        raise ValueError(f"spectrum: part must be one of {', '.join(PARTS)}, got {part!r}")
    _check_norm("spectrum", norm)
    if pick("spectrum", impl, x, triton=False) == "reference":
        from .reference import forward
    else:
        from .torch_impl import forward
    with torch.autocast(x.device.type, enabled=False):
        z = forward(x.to(torch.promote_types(x.dtype, torch.float32)), norm)
    if part == "complex":
        return z
    return z.abs() if part == "amplitude" else z.angle()


def inverse_spectrum(z: Tensor, size: tuple[int, int], *, norm: str = "ortho", impl: str = "auto") -> Tensor:
    """Turn coefficients into images. Differentiable, any number of times.

    Args:
        z: complex coefficients, (..., h, w // 2 + 1). Imaginary parts that no real image has are ignored.
        size: rows and columns (h, w) of the image; the coefficients cannot tell whether w is odd.
        norm: the one that they were made with.
        impl: "reference", "torch", or "auto" (torch).

    Returns:
        (..., h, w), float32 or wider.

    Raises:
        ValueError: shape, dtype or option.
    """
    h, w = size
    if min(size) < 1 or z.ndim < 2 or z.shape[-2:] != (h, w // 2 + 1) or not z.is_complex():
        given = f"{tuple(z.shape)} {z.dtype}"
        raise ValueError(f"inverse_spectrum: z must be complex (..., {h}, {w // 2 + 1}) for size {size}, got {given}")
    _check_norm("inverse_spectrum", norm)
    if pick("inverse_spectrum", impl, z, triton=False) == "reference":
        from .reference import inverse
    else:
        from .torch_impl import inverse
    with torch.autocast(z.device.type, enabled=False):
        return inverse(z, size, norm)


def _check_norm(op: str, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be ortho or backward, got {norm!r}")
