"""Rings of frequencies."""

import torch
from torch import Tensor


def radial_mask(
    size: tuple[int, int],
    inner: float,
    outer: float,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mark the coefficients of a half plane whose frequency lies in [inner, outer).

    The frequency of coefficient (u, v) is sqrt(f_u^2 + f_v^2) in cycles per pixel: f runs from 0 to 1/2 along an axis
    and, for the rows of the second half, back from -1/2. Rings that follow each other share no coefficient.

    Args:
        size: rows and columns (h, w) of the image, each at least 1.
        inner: lowest frequency, at least 0; 0 lets the mean in.
        outer: first frequency that is too high, above `inner`; the highest of all is sqrt(1/2).
        dtype: of the mask.
        device: of the mask.

    Returns:
        (h, w // 2 + 1), 1 inside and 0 outside.

    Raises:
        ValueError: size or bounds.
    """
    if min(size) < 1:
        raise ValueError(f"radial_mask: size must be at least (1, 1), got {size}")
    if not 0 <= inner < outer:
        raise ValueError(f"radial_mask: inner and outer must be 0 <= inner < outer, got {inner}, {outer}")
    rows = torch.fft.fftfreq(size[0], dtype=torch.float64, device=device)
    columns = torch.fft.rfftfreq(size[1], dtype=torch.float64, device=device)
    frequency = torch.hypot(rows[:, None], columns)  # h w//2+1
    return ((frequency >= inner) & (frequency < outer)).to(dtype)
