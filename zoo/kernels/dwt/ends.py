"""What a signal is taken to be beyond its ends, written into a buffer, and the adjoint of that writing."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .filters import band_size

WEIGHTED = ("antisymmetric", "antireflect", "smooth")  # modes that do more than to repeat samples


def before(taps: int, mode: str) -> int:
    """Samples ahead of the first given one that the first coefficient reads."""
    return taps // 2 - 1 if mode == "periodization" else taps - 2


def fill(x: Tensor, axis: int, start: int, n: int, mode: str) -> None:
    """Write all samples along `axis` but the given ones, in place.

    Args:
        x: a buffer that holds the given samples; any strides.
        axis: which one.
        start: where along it the given samples start.
        n: how many there are.
        mode: one of MODES.
    """
    given = x.narrow(axis, start, n)
    for first, last in _outside(x.shape[axis], start, n):
        if mode == "zero":
            x.narrow(axis, first, last - first).zero_()
            continue
        span, index, weights = _rule(first - start, last - start, n, mode, x.dtype, x.device)
        part = given.narrow(axis, *span).index_select(axis, index)  # of few samples: all that it reads are copied
        if mode in WEIGHTED:
            own, head, tail = _along(weights, axis, x.ndim)
            part = own * part + head * given.narrow(axis, 0, 1) + tail * given.narrow(axis, n - 1, 1)
        x.narrow(axis, first, last - first).copy_(part)


def fold(x: Tensor, axis: int, start: int, n: int, mode: str) -> None:
    """Add to the given samples what they weigh in those beyond the ends, in place: the adjoint of `fill`."""
    given = x.narrow(axis, start, n)
    for first, last in _outside(x.shape[axis], start, n) if mode != "zero" else ():
        span, index, weights = _rule(first - start, last - start, n, mode, x.dtype, x.device)
        part = x.narrow(axis, first, last - first)
        if mode in WEIGHTED:
            own, head, tail = _along(weights, axis, x.ndim)
            given.narrow(axis, 0, 1).add_((head * part).sum(axis, keepdim=True))
            given.narrow(axis, n - 1, 1).add_((tail * part).sum(axis, keepdim=True))
            part = own * part
        given.narrow(axis, *span).index_add_(axis, index, part)


def fold_into(out: Tensor, x: Tensor, start: int, mode: str) -> None:
    """Fold all axes of `x` (n, *samples), in place, and keep the given samples: (n, *sizes)."""
    for axis, n in enumerate(out.shape[1:], 1):
        fold(x, axis, start, n, mode)
        x = x.narrow(axis, start, n)
    out.copy_(x)


def inner(start: int, sizes: Sequence[int]) -> tuple[slice, ...]:
    """The given samples of a buffer (n, *samples)."""
    return slice(None), *(slice(start, start + n) for n in sizes)


def _outside(size: int, start: int, n: int) -> list[tuple[int, int]]:
    """Where the samples beyond either end lie in a buffer."""
    return [(first, last) for first, last in ((0, start), (start + n, size)) if first < last]


def _along(weights: Tensor, axis: int, ndim: int) -> tuple[Tensor, ...]:
    return weights.view(3, -1, *[1] * (ndim - 1 - axis)).unbind()


@lru_cache(maxsize=256)
def _rule(
    first: int, last: int, n: int, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Where samples `first` to `last` come from: given ones (start, length), an index (count,) into these, and
    weights (3, count) of what it names, of the first and of the last given sample.
    """
    index, *weights = zip(*(sample(i, n, mode) for i in range(first, last)), strict=True)
    low = min(index)
    places = torch.tensor([i - low for i in index], device=device)
    return (low, max(index) + 1 - low), places, torch.tensor(weights, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def sources(n: int, taps: int, mode: str, device: torch.device) -> Tensor:
    """The given sample for each that the coefficients read, in order, -1 for zero: int32 (2 k + taps - 2,).

    Not for the modes in WEIGHTED.
    """
    start = before(taps, mode)
    places = (sample(i - start, n, mode)[:2] for i in range(2 * band_size(n, taps, mode) + taps - 2))
    return torch.tensor([i if weight else -1 for i, weight in places], dtype=torch.int32, device=device)


def sample(i: int, n: int, mode: str) -> tuple[int, float, float, float]:
    """Sample i of a signal without end: one that is given and its weight, and weights of the first and the last."""
    if mode == "zero":
        return (i, 1.0, 0.0, 0.0) if 0 <= i < n else (0, 0.0, 0.0, 0.0)
    if mode == "periodization":  # an odd signal repeats its last sample first
        return min(i % (n + n % 2), n - 1), 1.0, 0.0, 0.0
    if mode == "periodic":
        return i % n, 1.0, 0.0, 0.0
    if mode == "constant" or (n == 1 and mode == "smooth"):
        return min(max(i, 0), n - 1), 1.0, 0.0, 0.0
    if mode == "smooth":  # a straight line through the two samples at the end
        return (1, i, 1.0 - i, 0.0) if i < 0 else (n - 2, n - 1.0 - i, 0.0, i - n + 2.0)
    if mode in ("symmetric", "antisymmetric"):
        turn = i % (2 * n)
        return (turn, 1.0, 0.0, 0.0) if turn < n else (2 * n - 1 - turn, 1.0 if mode == "symmetric" else -1.0, 0.0, 0.0)
    rounds, turn = divmod(i, 2 * n - 2)
    if mode == "reflect":
        return min(turn, 2 * n - 2 - turn), 1.0, 0.0, 0.0
    climb = 2.0 * rounds  # antireflect: each round climbs by twice the difference of the ends
    return (turn, 1.0, -climb, climb) if turn < n else (2 * n - 2 - turn, -1.0, -climb, climb + 2.0)
