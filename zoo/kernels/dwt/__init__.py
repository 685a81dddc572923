"""Discrete wavelet transform of one level along one, two or three axes, and its inverse.

Along an axis of n samples, with the filters `lo` and `hi` of L taps and the signal extended beyond its ends by `mode`:

    approx[k] = sum_j lo[j] x[2 k + 1 - j]      detail[k] = sum_j hi[j] x[2 k + 1 - j]      0 <= k < (n + L - 1) // 2

and likewise along the other axes. `mode="periodization"` keeps (n + 1) // 2 of each, from 2 k + L / 2 - j in a signal
that goes around (an odd one repeats its last sample first). Numbers, order and lengths are those of pywt.

Bands are ordered with the first axis changing fastest: approx, detail (1-D); approx, horizontal, vertical, diagonal as
in `pywt.dwt2` (2-D); aaa, daa, ada, dda, aad, dad, add, ddd in the letters of `pywt.dwtn` (3-D). Computed in float32 or
wider, whatever the dtype. `zoo.kernels.dwt.levels` has transforms of several levels and wavelet packets.

Source: Mallat 1989; filters, boundary modes and conventions of PyWavelets.
"""

import torch
from torch import Tensor

from zoo.kernels.impls import pick

from .filters import MODES, band_size, filter_bank, signal_size

__all__ = ["dwt", "idwt"]


def dwt(x: Tensor, wave: str = "haar", *, ndim: int = 2, mode: str = "symmetric", impl: str = "auto") -> Tensor:
    """Take the last `ndim` axes apart into bands. Differentiable, any number of times.

    Args:
        x: signals, images or volumes, (b, c, *sizes) with `ndim` sizes of at least 1, odd ones too.
        wave: a discrete wavelet of pywt: "haar", "db4", "sym5", "bior4.4", ...
        ndim: axes to transform, 1 to 3.
        mode: what lies beyond the ends: "zero", "constant", "symmetric", "reflect", "periodic", "smooth",
            "antisymmetric", "antireflect", or "periodization" for the fewest coefficients.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, c, 2^ndim, *band sizes), dtype of `x`.

    Raises:
        ValueError: shape, dtype, name, or a size that the mode cannot extend.
    """
    _check("dwt", x, ndim, 2, mode)
    least = 2 if mode in ("reflect", "antireflect") else 1
    if min(x.shape[2:]) < least:
        raise ValueError(f"dwt: sizes must be at least {least} for mode {mode!r}, got {tuple(x.shape[2:])}")
    impl = pick("dwt", impl, x)
    if impl == "reference":
        from .reference import forward
    elif impl == "torch":
        from .torch_impl import forward
    else:
        from .triton_impl import forward
    with torch.autocast(x.device.type, enabled=False):
        return forward(x, filter_bank(wave), ndim, mode)


def idwt(
    bands: Tensor,
    wave: str = "haar",
    *,
    ndim: int = 2,
    mode: str = "symmetric",
    size: tuple[int, ...] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put the bands of `dwt` together again. Differentiable, any number of times.

    Exact to rounding for every mode and every wavelet but dmey, whose filters are cut short.

    Args:
        bands: (b, c, 2^ndim, *band sizes).
        wave: the wavelet that they were made with.
        ndim: number of transformed axes, 1 to 3.
        mode: the mode that they were made with.
        size: the sizes of the signal where some were odd, which the bands cannot tell; None takes all as even.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, c, *sizes), dtype of `bands`.

    Raises:
        ValueError: shape, dtype, name, or a size that these bands do not come from.
    """
    _check("idwt", bands, ndim, 3, mode)
    if bands.shape[2] != 2**ndim:
        raise ValueError(f"idwt: bands must be (b, c, {2**ndim}, ...) for ndim={ndim}, got {tuple(bands.shape)}")
    bank = filter_bank(wave)
    even = tuple(signal_size(n, bank.shape[1], mode) for n in bands.shape[3:])
    if min(even) < 1 or min(bands.shape[3:]) < band_size(1, bank.shape[1], mode):
        raise ValueError(f"idwt: bands of {wave!r} must be longer for mode {mode!r}, got {tuple(bands.shape)}")
    size = even if size is None else tuple(size)
    if len(size) != ndim or any(n not in (most - 1, most) or n < 1 for n, most in zip(size, even, strict=True)):
        raise ValueError(f"idwt: size must be {even}, or one less where the signal was odd, got {size}")
    impl = pick("idwt", impl, bands)
    if impl == "reference":
        from .reference import inverse
    elif impl == "torch":
        from .torch_impl import inverse
    else:
        from .triton_impl import inverse
    with torch.autocast(bands.device.type, enabled=False):
        return inverse(bands, bank, ndim, mode, size)


def _check(op: str, x: Tensor, ndim: int, lead: int, mode: str) -> None:
    if ndim not in (1, 2, 3):
        raise ValueError(f"{op}: ndim must be 1, 2 or 3, got {ndim}")
    if x.ndim != lead + ndim or not x.is_floating_point():
        given = f"{tuple(x.shape)} {x.dtype}"
        raise ValueError(f"{op}: input must be float with {lead + ndim} axes for ndim={ndim}, got {given}")
    if mode not in MODES:
        raise ValueError(f"{op}: mode must be one of {', '.join(MODES)}, got {mode!r}")
