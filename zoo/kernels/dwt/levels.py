"""Transforms of several levels, level by level: of the approximation only, or of every band."""

import torch
from torch import Tensor

from zoo.kernels.dwt import dwt, idwt

from .filters import band_size, filter_bank


def wavedec(
    x: Tensor, wave: str = "haar", *, levels: int, ndim: int = 2, mode: str = "symmetric", impl: str = "auto"
) -> list[Tensor]:
    """Take the last `ndim` axes apart, then the approximation again, `levels` times. Differentiable.

    Args:
        x: (b, c, *sizes) as for `dwt`.
        wave: a discrete wavelet of pywt.
        levels: how often, at least 1.
        ndim: axes to transform, 1 to 3.
        mode: boundary mode as for `dwt`.
        impl: as for `dwt`.

    Returns:
        Coarsest first, as pywt.wavedec has it: the approximation (b, c, 1, *k), then the details of each level,
        (b, c, 2^ndim - 1, *band sizes).

    Raises:
        ValueError: as `dwt`, or no level.
    """
    _check_levels("wavedec", levels)
    parts = []
    for _ in range(levels):
        bands = dwt(x, wave, ndim=ndim, mode=mode, impl=impl)
        parts.append(bands[:, :, 1:])
        x = bands[:, :, 0]
    return [x[:, :, None], *reversed(parts)]


def waverec(
    parts: list[Tensor],
    wave: str = "haar",
    *,
    ndim: int = 2,
    mode: str = "symmetric",
    size: tuple[int, ...] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put the parts of `wavedec` together again. Differentiable.

    Args:
        parts: the approximation and the details, coarsest first.
        wave: the wavelet that they were made with.
        ndim: number of transformed axes.
        mode: the mode that they were made with.
        size: the sizes of the signal where some were odd; None takes all as even.
        impl: as for `dwt`.

    Returns:
        (b, c, *sizes).

    Raises:
        ValueError: as `idwt`, or no details.
    """
    _check_levels("waverec", len(parts) - 1)
    y, *details = parts
    for level, part in enumerate(details, 1):
        finer = size if level == len(details) else tuple(details[level].shape[3:])
        y = idwt(torch.cat([y, part], 2), wave, ndim=ndim, mode=mode, size=finer, impl=impl)[:, :, None]
    return y[:, :, 0]


def packet(
    x: Tensor, wave: str = "haar", *, levels: int, ndim: int = 2, mode: str = "symmetric", impl: str = "auto"
) -> Tensor:
    """Take the last `ndim` axes apart, then every band again, `levels` times. Differentiable.

    Args:
        x: (b, c, *sizes) as for `dwt`.
        wave: a discrete wavelet of pywt.
        levels: how often, at least 1.
        ndim: axes to transform, 1 to 3.
        mode: boundary mode as for `dwt`.
        impl: as for `dwt`.

    Returns:
        (b, c, 2^(ndim levels), *band sizes). The band of the first level changes slowest: the natural order of
        pywt.WaveletPacket and WaveletPacket2D, with a, h, v, d each in the order of `dwt`.

    Raises:
        ValueError: as `dwt`, or no level.
    """
    _check_levels("packet", levels)
    bands = x[:, :, None]  # b c bands *k
    for _ in range(levels):
        bands = dwt(bands.flatten(1, 2), wave, ndim=ndim, mode=mode, impl=impl)  # b (c bands) 2^ndim *k
        bands = bands.unflatten(1, (x.shape[1], -1)).flatten(2, 3)
    return bands


def unpacket(
    bands: Tensor,
    wave: str = "haar",
    *,
    levels: int,
    ndim: int = 2,
    mode: str = "symmetric",
    size: tuple[int, ...] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Put the bands of `packet` together again. Differentiable.

    Args:
        bands: (b, c, 2^(ndim levels), *band sizes).
        wave: the wavelet that they were made with.
        levels: the levels that they were made with.
        ndim: number of transformed axes.
        mode: the mode that they were made with.
        size: the sizes of the signal where some were odd, there or on the way; None takes all as even.
        impl: as for `dwt`.

    Returns:
        (b, c, *sizes).

    Raises:
        ValueError: as `idwt`, or no level, or another number of bands.
    """
    _check_levels("unpacket", levels)
    if bands.ndim != 3 + ndim or bands.shape[2] != 2 ** (ndim * levels):
        want = f"(b, c, {2 ** (ndim * levels)}, ...) for {levels=}, {ndim=}"
        raise ValueError(f"unpacket: bands must be {want}, got {tuple(bands.shape)}")
    sizes: list[tuple[int, ...] | None] = [size]
    for _ in range(levels - 1):
        finer, taps = sizes[-1], filter_bank(wave).shape[1]
        sizes.append(None if finer is None else tuple(band_size(n, taps, mode) for n in finer))
    channels = bands.shape[1]
    for finer in reversed(sizes):
        groups = bands.unflatten(2, (-1, 2**ndim)).flatten(1, 2)  # b (c bands) 2^ndim *k
        bands = idwt(groups, wave, ndim=ndim, mode=mode, size=finer, impl=impl).unflatten(1, (channels, -1))
    return bands[:, :, 0]


def _check_levels(op: str, levels: int) -> None:
    if levels < 1:
        raise ValueError(f"{op}: levels must be at least 1, got {levels}")
