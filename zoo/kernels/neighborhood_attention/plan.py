"""Who sees whom, axis by axis, as integers; the one place where windows are computed.

Every window is an interval on each axis. Dilation is a change of order: tokens whose coordinates agree modulo the
dilation form a class, classes lie one after the other, and inside a class windows are plain intervals again. So `i` and
`j` below count in that order of an axis; `Spans.position` leads back to the coordinate. Starts and ends never fall,
which makes the queries that may see a key an interval too.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Axis(NamedTuple):
    """One axis of the grid: `length` tokens, and the rule of its windows."""

    length: int
    kernel: int
    dilation: int
    stride: int
    causal: bool
    clamp: bool

    @property
    def reach(self) -> int:
        """Steps between a query and the furthest key that it may see."""
        return self.kernel - 1 if self.clamp or self.causal else self.kernel // 2 + self.stride // 2


class Geometry(NamedTuple):
    """The axes, and the radius of a circle around the centre of each window; 0 when windows are boxes."""

    axes: tuple[Axis, ...]
    radius: int

    def pack(self) -> list[int]:
        """Plain integers, as registered ops take them."""
        return [int(number) for axis in self.axes for number in axis] + [self.radius]

    @staticmethod
    def unpack(numbers: Sequence[int]) -> "Geometry":
        """The inverse of `pack`."""
        *flat, radius = numbers
        width = len(Axis._fields)
        return Geometry(tuple(Axis._make(flat[i : i + width]) for i in range(0, len(flat), width)), radius)


class Spans(NamedTuple):
    """The window of each query of an axis, (length,) int64 each."""

    position: Tensor  # coordinate
    start: Tensor  # first key
    stop: Tensor  # behind the last key
    centre: Tensor  # from where a circle is drawn


class Tile(NamedTuple):
    """Neighbouring queries of an axis and the union of their windows, or keys and the queries that may see them."""

    own: range
    other: range
    position: int  # coordinate of the first of `own`


class Run(NamedTuple):
    """Tiles of an axis whose windows lie alike; the first of them, and the coordinates at which all begin."""

    first: Tile
    positions: tuple[int, ...]


@lru_cache(maxsize=256)
def spans(axis: Axis) -> Spans:
    """Windows along an axis.

    Queries share the window of their leader, one in each `stride`. It begins kernel // 2 before the leader; at the ends
    it is moved inside (`clamp`) or cut off. A causal window ends at its query and begins kernel - 1 before the leader,
    the last of its group there. An axis (or class of it) shorter than the kernel is seen whole.
    """
    index = torch.arange(axis.length, device="cpu")
    position = (index % axis.dilation).argsort(stable=True)
    residue, i = position % axis.dilation, position // axis.dilation
    length = (axis.length - residue + axis.dilation - 1) // axis.dilation  # of the class
    group = i // axis.stride * axis.stride
    if axis.causal:
        start, stop, centre = torch.minimum(group + axis.stride, length) - axis.kernel, i + 1, i
    else:
        centre = torch.minimum(group + axis.stride // 2, length - 1)
        start = centre - axis.kernel // 2
        if axis.clamp:
            start = torch.minimum(start, length - axis.kernel).clamp(min=0)
        stop = torch.minimum(start + axis.kernel, length)
    base = index - i  # where the class begins
    return Spans(position, base + start.clamp(min=0), base + stop, base + centre)


@lru_cache(maxsize=256)
def query_tiles(axis: Axis, size: int) -> tuple[Tile, ...]:
    """At most `size` queries each, all of one class, with the keys that they see."""
    window = spans(axis)
    return tuple(
        Tile(own, range(int(window.start[own[0]]), int(window.stop[own[-1]])), int(window.position[own[0]]))
        for own in _cut(axis, size)
    )


@lru_cache(maxsize=256)
def key_tiles(axis: Axis, size: int) -> tuple[Tile, ...]:
    """At most `size` keys each, all of one class, with the queries that may see them: maybe none."""
    window, own = spans(axis), list(_cut(axis, size))
    first = torch.searchsorted(window.stop, torch.tensor([keys.start for keys in own]), right=True).tolist()
    behind = torch.searchsorted(window.start, torch.tensor([keys.stop for keys in own])).tolist()
    return tuple(
        Tile(keys, range(*queries), int(window.position[keys[0]]))
        for keys, *queries in zip(own, first, behind, strict=True)
    )


@lru_cache(maxsize=256)
def runs(axis: Axis, size: int) -> tuple[Run, ...]:
    """The query tiles of an axis, those that lie alike in one."""
    found: dict[tuple[int, ...], Run] = {}
    window = spans(axis)
    for tile in query_tiles(axis, size):
        share = slice(tile.own.start, tile.own.stop)
        pattern = torch.stack([x[share] - tile.own.start for x in (window.start, window.stop, window.centre)])
        run = found.setdefault(tuple(pattern.flatten().tolist()), Run(tile, ()))
        found[tuple(pattern.flatten().tolist())] = Run(run.first, (*run.positions, tile.position))
    return tuple(found.values())


def pairs(geometry: Geometry, queries: Sequence[range], keys: Sequence[range]) -> tuple[Tensor, Tensor]:
    """Which of the pairs between two boxes see each other, and the row of the bias table of those that do.

    Args:
        geometry: of `ndim` axes.
        queries: an interval on each axis.
        keys: an interval on each axis.

    Returns:
        (n, m) bool and (n, m) int64, both boxes in raster order.
    """
    seen, row, distance = torch.ones(1, 1, dtype=torch.bool), *(torch.zeros(1, 1, dtype=torch.int64) for _ in range(2))
    for axis, own, other in zip(geometry.axes, queries, keys, strict=True):
        _, start, stop, centre = (x[own.start : own.stop, None] for x in spans(axis))
        i, j = torch.arange(own.start, own.stop)[:, None], torch.arange(other.start, other.stop)[None]
        seen = _outer(seen) & _inner((start <= j) & (j < stop))
        row = _outer(row) * (2 * axis.reach + 1) + _inner(j - i + axis.reach)
        distance = _outer(distance) + _inner((j - centre).square())
        seen, row, distance = (x.flatten(2).flatten(0, 1) for x in (seen, row, distance))
    if geometry.radius:
        seen = seen & (distance < geometry.radius**2)
    return seen, row.where(seen, 0)


def tokens(axes: Sequence[Axis], coordinates: Sequence[Tensor]) -> Tensor:
    """Index in raster order of each point of the box that the coordinates span; steps become steps."""
    token = torch.zeros(1, dtype=torch.int64)
    for axis, coordinate in zip(axes, coordinates, strict=True):
        token = (token[:, None] * axis.length + coordinate).flatten()
    return token


def _cut(axis: Axis, size: int) -> Iterator[range]:
    start = 0
    for residue in range(min(axis.dilation, axis.length)):
        stop = start + len(range(residue, axis.length, axis.dilation))
        yield from (range(first, min(first + size, stop)) for first in range(start, stop, size))
        start = stop


def _outer(x: Tensor) -> Tensor:
    return x[:, None, :, None]


def _inner(x: Tensor) -> Tensor:
    return x[None, :, None, :]
