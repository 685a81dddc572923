"""A few planes at a time, so that nothing but the input and the result leaves the cache.

Haar is sums and differences of every other sample. Longer filters are one small matrix for each axis, slid over it:
that is some more sums than the filters have, at the speed of a matrix product. The backward of either direction is the
other one. Registered as `zoo::dwt_analysis` and `zoo::dwt_synthesis`, so that torch.compile sees one node.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .blocks import analysis_matrix, synthesis_matrix
from .ends import before, fill, fold_into, inner
from .filters import band_size, signal_size

_CACHE = 2**19  # samples that stay close to a core while it works on them: two MiB in float32
_SIDE = 8  # coefficients at once along an axis: more are more zeros in the matrix, fewer are smaller products


def forward(x: Tensor, bank: Tensor, ndim: int, mode: str) -> Tensor:
    return _analysis(x.flatten(0, 1), _widen(bank[:2], x), mode).unflatten(0, x.shape[:2])


def inverse(bands: Tensor, bank: Tensor, ndim: int, mode: str, size: tuple[int, ...]) -> Tensor:
    ends = "periodization" if mode == "periodization" else "zero"
    even = [signal_size(n, bank.shape[1], mode) for n in bands.shape[3:]]
    y = _synthesis(bands.flatten(0, 1), _widen(bank[2:].flip(1), bands), ends, even).unflatten(0, bands.shape[:2])
    return y[(..., *(slice(n) for n in size))]


def _widen(taps: Tensor, x: Tensor) -> Tensor:
    return taps.to(x.device, torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("zoo::dwt_analysis", mutates_args=())
def _analysis(x: Tensor, taps: Tensor, mode: str) -> Tensor:
    """Bands (n, bands, *k) of signals (n, *sizes), in the precision of `taps`; dtype of `x`."""
    out = _bands_like(x, taps, mode)
    (_haar_analysis if taps.shape[1] == 2 else _block_analysis)(x, taps, mode, out)
    return out


@torch.library.custom_op("zoo::dwt_synthesis", mutates_args=())
def _synthesis(bands: Tensor, taps: Tensor, mode: str, sizes: Sequence[int]) -> Tensor:
    """The adjoint of `_analysis`: (n, bands, *k) -> (n, *sizes)."""
    out = bands.new_empty(len(bands), *sizes)
    (_haar_synthesis if taps.shape[1] == 2 else _block_synthesis)(bands, taps, mode, out)
    return out


@_analysis.register_fake
def _bands_like(x: Tensor, taps: Tensor, mode: str) -> Tensor:
    sizes = [band_size(n, taps.shape[1], mode) for n in x.shape[1:]]
    return x.new_empty(len(x), 2 ** len(sizes), *sizes)


@_synthesis.register_fake
def _(bands: Tensor, taps: Tensor, mode: str, sizes: Sequence[int]) -> Tensor:
    return bands.new_empty(len(bands), *sizes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    ctx.save_for_backward(inputs[1])
    ctx.mode, ctx.sizes = inputs[2], inputs[0].shape[1:]


_analysis.register_autograd(
    lambda ctx, grad: (_synthesis(grad, *ctx.saved_tensors, ctx.mode, ctx.sizes), None, None), setup_context=_keep
)
_synthesis.register_autograd(
    lambda ctx, grad: (_analysis(grad, *ctx.saved_tensors, ctx.mode), None, None, None), setup_context=_keep
)


def _haar_analysis(x: Tensor, taps: Tensor, mode: str, out: Tensor) -> None:
    ndim, sizes = x.ndim - 1, x.shape[1:]
    even = [n + n % 2 for n in sizes]
    scale, step = 0.5 ** (ndim / 2), _planes(len(x), 2 * prod(even))  # every bank of two taps is haar's
    spare = taps.new_empty(2, step * prod(even))  # memory that is new costs more than the sums
    for given, wanted in zip(x.split(step), out.split(step), strict=True):
        y = given.to(taps.dtype)
        if even != list(sizes):
            y = F.pad(y, [p for n in reversed(sizes) for p in (0, n % 2)])
            for axis, n in enumerate(sizes, 1):
                fill(y, axis, 0, n, mode)
        y = y[None]  # bands n *sizes
        for axis in range(ndim):
            last = axis == ndim - 1
            if last:
                y = torch.mul(y, scale, out=_view(spare[ndim % 2], *y.shape))
            first, second = y.unflatten(axis + 2, (-1, 2)).unbind(axis + 3)
            joint = wanted.transpose(0, 1) if last else _view(spare[axis % 2], 2 * len(y), *first.shape[1:])
            torch.add(first, second, out=joint[: len(y)])
            torch.sub(first, second, out=joint[len(y) :])
            y = joint


def _haar_synthesis(bands: Tensor, taps: Tensor, mode: str, out: Tensor) -> None:
    ndim, even = bands.ndim - 2, [2 * k for k in bands.shape[2:]]
    scale, step = 0.5 ** (ndim / 2), _planes(len(bands), 2 * prod(even))
    spare = taps.new_empty(2, step * prod(even))
    for given, wanted in zip(bands.split(step), out.split(step), strict=True):
        y = given.to(taps.dtype).transpose(0, 1)  # bands n *k
        for axis in reversed(range(ndim)):
            if axis == 0:
                y = torch.mul(y, scale, out=_view(spare[ndim % 2], *y.shape))
            low, high = y.chunk(2)
            shape = *low.shape[: axis + 2], even[axis], *low.shape[axis + 3 :]
            y = wanted[None] if shape[1:] == wanted.shape else _view(spare[(ndim - 1 - axis) % 2], *shape)
            first, second = y.unflatten(axis + 2, (-1, 2)).unbind(axis + 3)
            torch.add(low, high, out=first)
            torch.sub(low, high, out=second)
        if y.shape[1:] != wanted.shape:
            fold_into(wanted, y[0], 0, mode)


def _block_analysis(x: Tensor, taps: Tensor, mode: str, out: Tensor) -> None:
    ndim, length, sizes = x.ndim - 1, taps.shape[1], out.shape[2:]
    start, step = before(length, mode), _planes(len(x), 4 * prod(x.shape[1:]))
    matrices = [analysis_matrix(taps, _side(k)) for k in sizes]
    sides = [len(matrix) // 2 for matrix in matrices]
    counts = [-(-k // side) for k, side in zip(sizes, sides, strict=True)]
    buffer = _buffer(taps, step, [2 * count * side + length - 2 for count, side in zip(counts, sides, strict=True)])
    blocks = [(count, 2, side) for count, side in zip(counts[:-1], sides[:-1], strict=True)]
    blocks = [size for block in reversed(blocks) for size in block]
    for given, wanted in zip(x.split(step), out.split(step), strict=True):
        y = buffer[: len(given)]
        y[inner(start, x.shape[1:])] = given
        for axis, (n, k) in enumerate(zip(x.shape[1:], sizes, strict=True), 1):
            fill(y.narrow(axis, 0, 2 * k + length - 2), axis, start, n, mode)
        for axis, matrix in enumerate(matrices, 1):
            y = _slide(y, axis, matrix)
        y = y.view(counts[-1], *blocks, len(given), 2, sides[-1]).permute(_BLOCK_ORDER[ndim])
        y = y.reshape(len(given), 2**ndim, *(c * s for c, s in zip(counts, sides, strict=True)))
        wanted.copy_(y[(..., *inner(0, sizes)[1:])])


def _block_synthesis(bands: Tensor, taps: Tensor, mode: str, out: Tensor) -> None:
    ndim, sizes, reach = bands.ndim - 2, bands.shape[2:], taps.shape[1] // 2 - 1
    start, step = before(taps.shape[1], mode), _planes(len(bands), 4 * prod(bands.shape[1:]))
    matrices = [synthesis_matrix(taps, _side(k + reach)) for k in sizes]
    sides = [len(matrix) // 2 for matrix in matrices]
    lengths = [side * -(-(k + reach) // side) + reach for k, side in zip(sizes, sides, strict=True)]
    buffer = _buffer(taps, step, [2 * k for k in lengths])  # n *(k band)
    for given, wanted in zip(bands.split(step), out.split(step), strict=True):
        y = buffer[: len(given)]
        pairs = y.view(len(y), *(size for k in lengths for size in (k, 2)))
        pairs = pairs.permute(0, *range(2 * ndim, 0, -2), *range(1, 2 * ndim, 2))  # n *bands *k
        pairs[(..., *inner(reach, sizes)[1:])] = given.unflatten(1, (2,) * ndim)
        for axis, matrix in enumerate(matrices, 1):
            y = _slide(y, axis, matrix)
        y = y.permute(ndim, *range(ndim - 1, -1, -1), ndim + 1).flatten(-2)  # n *samples
        fold_into(wanted, y[(..., *(slice(2 * (k + reach)) for k in sizes))], start, mode)


def _planes(count: int, size: int) -> int:
    """How many of `count` planes to work on together if one needs buffers of `size` samples."""
    return max(1, min(_CACHE // max(size, 1), count))


def _side(k: int) -> int:
    """At most _SIDE coefficients, so that little is left over."""
    return -(-k // -(-k // _SIDE))


def _view(flat: Tensor, *shape: int) -> Tensor:
    return flat[: prod(shape)].view(shape)


# (blocks of the last axis, *(blocks, band, side) of the others backwards, n, band, side) to n *bands *(blocks, side)
_BLOCK_ORDER = {1: (1, 2, 0, 3), 2: (4, 5, 2, 1, 3, 0, 6), 3: (7, 8, 2, 5, 4, 6, 1, 3, 0, 9)}


def _buffer(like: Tensor, n: int, sizes: list[int]) -> Tensor:
    """Zeros (n, *sizes), the first of several axes outermost: so its rows are those of one matrix."""
    if len(sizes) == 1:
        return like.new_zeros(n, *sizes)
    return like.new_zeros(sizes[0], n, *sizes[1:]).transpose(0, 1)


def _slide(y: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply the windows along an axis.

    Returns:
        (results, *others), or (windows, *others, results of each) along the last.
    """
    side, width = matrix.shape
    if axis < y.ndim - 1:
        y = y.movedim(axis, 0)
        windows = y.flatten(1).unfold(0, width, side).mT  # windows width (others)
        return torch.bmm(matrix.expand(len(windows), -1, -1), windows).flatten(0, 1).unflatten(1, y.shape[1:])
    windows = y.flatten(0, -2).unfold(1, width, side).transpose(0, 1)  # windows (others) width
    return torch.bmm(windows, matrix.mT.expand(len(windows), -1, -1)).unflatten(1, y.shape[:-1])
