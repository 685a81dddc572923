"""Extend the ends, then one strided convolution for all bands and axes; haar on even sizes is one small matrix.

A convolution of stride two from one channel to four leaves a vector unit mostly idle. Two coefficients an axis at a
time (four samples, on the way back) fill it with 16 channels, which took half the time.
"""

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F

from .filters import band_size

_TILE = 2  # coefficients along an axis that one step of the convolution computes
_OUTER = {1: "bti->bti", 2: "bti,csj->cbtsij", 3: "bti,csj,dru->dcbtsriju"}  # the first axis of bands is the fastest
_CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def forward(x: Tensor, bank: Tensor, ndim: int, mode: str) -> Tensor:
    wide, taps = _widen(x, bank[:2])
    length = taps.shape[1]
    if length == 2 and not any(n % 2 for n in x.shape[2:]):  # no sample lies beyond the ends, whatever the mode
        tiles = _split(wide.flatten(0, 1), ndim)  # (b c) 2^ndim *k
        bands = (_haar(taps, ndim) @ tiles.flatten(2)).view(tiles.shape)
        return bands.unflatten(0, x.shape[:2]).to(x.dtype)
    for axis, n in enumerate(x.shape[2:], 2):
        if mode == "periodization":
            wide = _extend(wide, axis, length // 2 - 1, length // 2 - 1 + n % 2, mode)
        else:
            wide = _extend(wide, axis, length - 2, 2 * band_size(n, length, mode) - n, mode)
    return _Analysis.apply(wide.flatten(0, 1), taps).unflatten(0, x.shape[:2]).to(x.dtype)


def inverse(bands: Tensor, bank: Tensor, ndim: int, mode: str, size: tuple[int, ...]) -> Tensor:
    wide, taps = _widen(bands, bank[2:])
    length, start = taps.shape[1], 0
    if length == 2:
        wide = wide.flatten(0, 1)  # (b c) 2^ndim *k
        tiles = (_haar(taps.flip(1), ndim).T @ wide.flatten(2)).view(wide.shape)
        y = _join(tiles, 2, ndim)[:, 0].unflatten(0, bands.shape[:2])  # b c *sizes
    else:
        start = length - 2
        if mode == "periodization":
            before, after = (length // 2 + 1) // 2, length // 4
            for axis in range(3, 3 + ndim):
                wide = _extend(wide, axis, before, after, "periodic")
            start = 2 * before + length // 2 - 1
        y = _Synthesis.apply(wide.flatten(0, 1), taps.flip(1)).unflatten(0, bands.shape[:2])
    for axis, n in enumerate(size, 2):
        y = y.narrow(axis, start, n)
    return y.to(bands.dtype)


class _Analysis(torch.autograd.Function):
    """Each band of signals (n, *sizes), 2 k + L - 2 long: y[k] = sum_j taps[j] x[2 k + L - 1 - j]; (n, bands, *k).

    Autograd's own adjoint of the convolution takes four times as long as `_Synthesis`.
    """

    @staticmethod
    def forward(ctx: BackwardCFunction, x: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(taps)
        ndim, length = x.ndim - 1, taps.shape[1]
        sizes = [(n - length + 2) // 2 for n in x.shape[1:]]
        x = F.pad(x, [p for n in reversed(sizes) for p in (0, 2 * (n % _TILE))]) if any(n % 2 for n in sizes) else x
        axis = taps.new_zeros(2, _TILE, length + 2 * (_TILE - 1))  # b t i
        for t in range(_TILE):
            axis[:, t, 2 * t : 2 * t + length] = taps.flip(1)
        kernel = _outer(axis, ndim).flatten(0, 1)[:, None]  # (bands t) 1 *i
        y = _CONVOLUTION[ndim](x[:, None], kernel, stride=2 * _TILE)
        y = _join(y, _TILE, ndim)  # n bands *k
        return y[(..., *(slice(n) for n in sizes))]

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None]:
        return _Synthesis.apply(grad, *ctx.saved_tensors), None


class _Synthesis(torch.autograd.Function):
    """The adjoint of `_Analysis`: x[m] = sum_k,bands taps[2 k + L - 1 - m] y[k]; (n, bands, *k) -> (n, *sizes)."""

    @staticmethod
    def forward(ctx: BackwardCFunction, bands: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(taps)
        ndim, length = bands.ndim - 2, taps.shape[1]
        reach = length // 2 - 1  # coefficients before the tile that still touch it
        sizes = [2 * n + length - 2 for n in bands.shape[2:]]
        bands = F.pad(bands, [p for n in reversed(sizes) for p in (0, n // 2 % _TILE)])
        axis = taps.new_zeros(2, 2 * _TILE, reach + _TILE)  # b t i
        for t in range(2 * _TILE):
            for i in range(reach + _TILE):
                if 0 <= (j := 2 * (i - reach) + length - 1 - t) < length:
                    axis[:, t, i] = taps[:, j]
        kernel = _outer(axis, ndim).transpose(0, 1)  # t bands *i
        y = _CONVOLUTION[ndim](bands, kernel, stride=_TILE, padding=reach)
        y = _join(y, 2 * _TILE, ndim)[:, 0]  # n *sizes
        return y[(..., *(slice(n) for n in sizes))]

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> tuple[Tensor, None]:
        return _Analysis.apply(grad, *ctx.saved_tensors), None


def _widen(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide, taps.to(wide)


def _outer(axis: Tensor, ndim: int) -> Tensor:
    """Kernel of all axes, (2^ndim bands, t^ndim, *i), from that of one, (b, t, i)."""
    return torch.einsum(_OUTER[ndim], *[axis] * ndim).flatten(ndim, 2 * ndim - 1).flatten(0, ndim - 1)


def _haar(taps: Tensor, ndim: int) -> Tensor:
    """Bands by samples of a tile of two a side."""
    return _outer(taps.flip(1)[:, None], ndim).flatten(1)


def _split(x: Tensor, ndim: int) -> Tensor:
    """Tiles of two samples a side, in raster order: n *(k 2) -> n 2^ndim *k."""
    for axis in range(ndim, 0, -1):
        x = x.unflatten(axis, (-1, 2))  # n k 2 k 2
    return x.permute(0, *range(2, 2 * ndim + 1, 2), *range(1, 2 * ndim, 2)).flatten(1, ndim)


def _join(x: Tensor, side: int, ndim: int) -> Tensor:
    """Put tiles together: n (c side^ndim) *k -> n c *(k side)."""
    x = x.unflatten(1, (-1, *[side] * ndim))  # n c *side *k
    x = x.permute(0, 1, *(2 + i // 2 + ndim * (1 - i % 2) for i in range(2 * ndim)))  # n c k side k side
    for axis in range(2, 2 + ndim):
        x = x.flatten(axis, axis + 1)
    return x


def _extend(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Add samples at both ends of an axis by the rule of `mode`."""
    n, parts = x.shape[axis], [x]
    if mode == "zero":
        return F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [before, after]) if before or after else x
    for outside in (range(-before, 0), range(n, n + after)):
        if not outside:
            continue
        index, *weights = zip(*(_outside(i, n, mode) for i in outside), strict=True)
        part = x.index_select(axis, torch.tensor(index, device=x.device))
        if mode in ("antisymmetric", "antireflect", "smooth"):
            shape = -1, *[1] * (x.ndim - 1 - axis)
            own, first, last = (torch.tensor(w, dtype=x.dtype, device=x.device).view(shape) for w in weights)
            part = own * part + first * x.narrow(axis, 0, 1) + last * x.narrow(axis, n - 1, 1)
        parts.insert(0 if outside.start < 0 else 2, part)
    return torch.cat(parts, axis)


def _outside(i: int, n: int, mode: str) -> tuple[int, float, float, float]:
    """Sample i beyond the ends as one given sample: its index and weight, and weights of the first and the last."""
    if mode == "periodization":
        return min(i % (n + n % 2), n - 1), 1.0, 0.0, 0.0
    if mode == "periodic":
        return i % n, 1.0, 0.0, 0.0
    if mode == "constant" or (n == 1 and mode == "smooth"):
        return min(max(i, 0), n - 1), 1.0, 0.0, 0.0
    if mode == "smooth":  # a straight line
        return (1, i, 1.0 - i, 0.0) if i < 0 else (n - 2, n - 1.0 - i, 0.0, i - n + 2.0)
    if mode in ("symmetric", "antisymmetric"):
        turn = i % (2 * n)
        return (turn, 1.0, 0.0, 0.0) if turn < n else (2 * n - 1 - turn, 1.0 if mode == "symmetric" else -1.0, 0.0, 0.0)
    period = 2 * n - 2
    rounds, turn = divmod(i, period)
    if mode == "reflect":
        return min(turn, period - turn), 1.0, 0.0, 0.0
    # antireflect: each round climbs by twice the difference of the ends
    climb = 2.0 * rounds
    return (turn, 1.0, -climb, climb) if turn < n else (period - turn, -1.0, -climb, climb + 2.0)
