"""Where the windows lie: which are worked on together, and which tokens of the map they hold.

Nothing is rolled or padded: windows that lie alike in the map are one strided view of it. A window that the border of
the map cuts in parts that do not see each other is worked on part by part, unless it is so small that calls cost more
than products: then it is masked.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

_SMALL = 2**14  # pairs; windows of 8 a side have 2**12, of 16 a side 2**16


class Span(NamedTuple):
    """Neighbouring tokens of a window along one axis: `first` counts from the corner of the window.

    A piece (at, start, length) says that the tokens from `at` on of the span are those from `start` on of the map. What
    no piece covers is padding.
    """

    first: int
    size: int
    pieces: tuple[tuple[int, int, int], ...]

    def moved(self, by: int) -> "Span":
        """The same tokens of a window that lies `by` tokens further on."""
        return self._replace(pieces=tuple((at, start + by, length) for at, start, length in self.pieces))


class Run(NamedTuple):
    """The same part of `count` windows along one axis, each `step` tokens after the one before."""

    count: int
    step: int
    queries: Span
    keys: Span
    seen: tuple[tuple[bool, ...], ...]  # by each query, which of the keys; empty where all see all

    def moved(self, by: int) -> "Run":
        """The same part of windows that lie `by` tokens further on."""
        return self._replace(queries=self.queries.moved(by), keys=self.keys.moved(by))

    def mask(self) -> Tensor:
        """Which of the keys each query sees, bool (n, m) along the axis."""
        if self.seen:
            return torch.tensor(self.seen)
        return torch.ones(self.queries.size, self.keys.size, dtype=torch.bool)


class Block(NamedTuple):
    """Windows worked on together: some images, and `counts` of rows and columns of windows, `steps` apart."""

    images: tuple[int, int]
    counts: tuple[int, int]
    steps: tuple[int, int]
    queries: tuple[Span, Span]
    keys: tuple[Span, Span]
    heads: int  # at a time
    bias: Tensor  # heads n m, or broadcast to it
    place: tuple[slice, ...]  # of the biases in (heads, wh, ww, kh, kw)


def blocks(
    q: Tensor,
    bias: Tensor | None,
    limit: int,
    grid: Sequence[int],
    window: Sequence[int],
    dilation: Sequence[int],
    shift: Sequence[int],
    overlap: Sequence[int],
    wrap: bool,
    attend: bool,
) -> Iterator[Block]:
    """Cut the map `q`, (b, h, w, heads, d), into blocks of about `limit` logits."""
    b, heads = q.shape[0], q.shape[3]
    axes = [()] * 2
    if q.numel():
        small = math.prod(window) * math.prod(s + 2 * o for s, o in zip(window, overlap, strict=True)) <= _SMALL
        axes = [runs(*axis, wrap, attend, small) for axis in zip(grid, window, dilation, shift, overlap, strict=True)]
    none = q.new_zeros(1, 1, 1, dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, columns in product(*axes):
        queries, keys = (rows.queries, columns.queries), (rows.keys, columns.keys)
        place = tuple(slice(span.first, span.first + span.size) for span in (*queries, *keys))
        part = none if bias is None else bias[(slice(None), *place)].flatten(1, 2).flatten(2, 3)  # heads n m
        if rows.seen or columns.seen:
            both = rows.mask()[:, None, :, None] & columns.mask()[:, None, :]  # wh ww kh kw
            part = part.masked_fill(~both.flatten(0, 1).flatten(1, 2).to(q.device), -torch.inf)
        part = part.expand(heads, -1, -1)
        most = limit // (queries[0].size * queries[1].size * keys[0].size * keys[1].size)
        # Whole rows of windows, whole images of them, as far as they fit.
        wide = _share(columns.count, most)
        high = _share(rows.count, most // columns.count)
        deep = _share(b, most // (columns.count * rows.count))
        together = _share(heads, most // (wide * high * deep))
        for image, top, left in product(range(0, b, deep), range(0, rows.count, high), range(0, columns.count, wide)):
            counts = min(high, rows.count - top), min(wide, columns.count - left)
            here, there = rows.moved(top * rows.step), columns.moved(left * columns.step)
            yield Block(
                (image, min(deep, b - image)),
                counts,
                (rows.step, columns.step),
                (here.queries, there.queries),
                (here.keys, there.keys),
                together,
                part,
                place,
            )


def _share(count: int, most: int) -> int:
    """The size of equal shares of `count` things, at most `most` each and at least one."""
    return -(-count // -(-count // max(1, most)))


@lru_cache(maxsize=64)
def runs(
    n: int, window: int, dilation: int, shift: int, overlap: int, wrap: bool, attend: bool, small: bool
) -> tuple[Run, ...]:
    """The parts of windows along an axis of `n` tokens that hold queries, those that lie alike in one."""
    cell = window * dilation  # holds as many windows as tokens lie between neighbours of one
    size = -(-n // cell) * cell
    cells, offsets = range(0, size, cell), range(dilation)
    if dilation > len(cells):
        step, corners = 1, [corner + offset for corner in cells for offset in offsets]
    else:
        step, corners = cell, [corner + offset for offset in offsets for corner in cells]
    found: list[Run] = []
    for corner in (corner + shift for corner in corners):
        queries = range(corner, corner + cell, dilation)
        keys = range(corner - overlap * dilation, corner + cell + overlap * dilation, dilation)
        for part in _parts(n, size if shift else None, queries, keys, wrap, attend, small):
            part = part._replace(step=step)
            if found and part == found[-1]._replace(count=1).moved(found[-1].count * step):
                found[-1] = found[-1]._replace(count=found[-1].count + 1)
            else:
                found.append(part)
    return tuple(found)


def _parts(
    n: int, size: int | None, queries: range, keys: range, wrap: bool, attend: bool, small: bool
) -> Iterator[Run]:
    """Split one window where its tokens do not see each other; `size` is the length at which the axis goes around."""

    def token(i: int) -> int:
        return i if size is None or i < size else i - size

    def real(i: int) -> bool:
        return 0 <= token(i) < n

    def span(tokens: range, whole: range) -> Span:
        return Span(whole.index(tokens[0]), len(tokens), _pieces([token(i) for i in tokens], n, whole.step))

    def around(i: int) -> bool:
        return size is not None and i >= size and not wrap

    for only in (None,) if small else (False, True):
        inside, seen = ([i for i in tokens if only in (None, around(i))] for tokens in (queries, keys))
        inside = [i for i in inside if real(i)]
        seen = [i for i in seen if attend or real(i)]
        if not inside:
            continue
        # A window in one may hold padding between its tokens; what its padded queries see does not matter.
        inside, seen = (range(tokens[0], tokens[-1] + 1, queries.step) for tokens in (inside, seen))
        sees = ()
        sides = {around(i) for i in inside if real(i)} | {around(j) for j in seen}
        if len(sides) > 1 or not (attend or all(map(real, seen))):  # a look at each pair costs more than its products
            sees = tuple(
                tuple((attend or real(j)) and (around(i) == around(j) or not real(i)) for j in seen) for i in inside
            )
        yield Run(1, 0, span(inside, queries), span(seen, keys), sees)


def _pieces(tokens: list[int], n: int, apart: int) -> tuple[tuple[int, int, int], ...]:
    """Stretches of tokens of the map that lie `apart`."""
    found: list[tuple[int, int, int]] = []
    for at, token in enumerate(tokens):
        if not 0 <= token < n:
            continue
        if found and (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2] * apart) == (at, token):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((at, token, 1))
    return tuple(found)
