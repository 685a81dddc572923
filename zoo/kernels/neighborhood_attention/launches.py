"""What a launch of the GPU kernels needs: sizes of its tiles, and the geometry as one tensor of integers."""

from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from zoo.kernels.chips import tuned

from .plan import Axis, Geometry, key_tiles, query_tiles, spans
from .tuning import TILES

# Where the plan holds what, three numbers each: steps between tokens, reach of the bias, numbers of query tiles and of
# key tiles, then the places of the tables of windows, of query tiles and of key tiles.
PLACES = 0, 3, 6, 12, 15
_HEADER = 21
_LEAST = 16  # tokens of a tile that tl.dot takes


class Launch:
    """What the launches of one pass share.

    Attributes:
        plan: int32 tensor on the device, laid out as `PLACES` says.
        query_tiles: how many of them cover the grid.
        key_tiles: likewise.
        keys: of one tile.
        sizes: n, heads, extra keys, rows of the bias table.
        lengths: of the last two axes.
        radius2: square of the radius of a circle; None for boxes.
        widths: of heads, as they are and as powers of two; constants of the kernels, by name.
        constants: those and the others, by name.
        options: warps and stages.
    """

    def __init__(
        self, name: str, geometry: Geometry, q: Tensor, v: Tensor, extra_k: Tensor | None, table: Tensor | None
    ) -> None:
        d, e = q.shape[3], v.shape[3]
        wide = [max(16, _power_of_2(width)) for width in (d, e)]
        by_size = tuned(TILES, q)[name]
        tile = by_size[min(size for size in by_size if size >= max(wide) * q.element_size())]
        axes = (Axis(1, 1, 1, 1, False, True),) * (3 - len(geometry.axes)) + geometry.axes
        smaller = 1 if table is None or name == "keys" else 2  # the addresses of biases take registers
        own, other = (_sides(axes, size // smaller) for size in (tile.queries, tile.keys))
        self.plan, self.query_tiles, self.key_tiles = _plan(axes, own, other, q.device)
        self.keys, self.lengths = prod(other), [axis.length for axis in axes[1:]]
        self.radius2 = geometry.radius**2 or None
        extras, rows = 0 if extra_k is None else extra_k.shape[2], 0 if table is None else table.shape[1]
        self.sizes = q.shape[2], q.shape[1], extras, rows
        self.widths = {"D": d, "E": e, "BD": wide[0], "BE": wide[1]}
        self.constants = self.widths | {"T": own, "K": other, "NDIM": len(geometry.axes)}
        # Circles lie inside their boxes, but for those that end at the query.
        self.constants["BOUNDS"] = not geometry.radius or any(axis.causal for axis in axes)
        self.options = {"num_warps": tile.warps, "num_stages": tile.stages}


def in_rows(x: Tensor | None) -> Tensor | None:
    """Kernels step through rows; only tokens whose channels lie apart are copied."""
    return x if x is None or x.stride(3) == 1 else x.contiguous()


def tokens_first(x: Tensor) -> Tensor:
    """Empty, as `x`, in the order in which projections read and write: b n heads d."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def strides(*tensors: Tensor | None) -> list[int]:
    """Of images, heads and tokens, one tensor after the other; zeros for those that are not there."""
    return [step for x in tensors for step in ((0, 0, 0) if x is None else x.stride()[:3])]


def _sides(axes: tuple[Axis, ...], size: int) -> tuple[int, ...]:
    """Sides of a tile of `size` tokens, powers of two, as equal as the classes of the axes allow."""
    room = [_power_of_2(-(-axis.length // axis.dilation)) for axis in axes]
    sides = [1, 1, 1]
    while prod(sides) < max(size, _LEAST):
        free = [i for i in (2, 1, 0) if sides[i] < room[i]]
        if not free and prod(sides) >= _LEAST:
            break
        sides[min(free, key=lambda i: sides[i]) if free else 2] *= 2
    return tuple(sides)


def _power_of_2(n: int) -> int:
    """The smallest that is at least `n`."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=64)
def _plan(
    axes: tuple[Axis, ...], own: tuple[int, ...], other: tuple[int, ...], device: torch.device
) -> tuple[Tensor, int, int]:
    """Everything that kernels read of the geometry, int32, and the numbers of query tiles and of key tiles."""
    apart = [prod(axis.length for axis in axes[i + 1 :]) for i in range(3)]  # tokens between neighbours
    tables, counts = [], []
    for axis, step in zip(axes, apart, strict=True):
        position, *window = spans(axis)
        tables.append(torch.stack([*window, position * step], 1))
    for tiles, sides in ((query_tiles, own), (key_tiles, other)):
        for axis, step, side in zip(axes, apart, sides, strict=True):
            found = tiles(axis, side)
            counts.append(len(found))
            # Token at coordinate 0 of the class, as if it reached that far back; then tokens are sums of products.
            first = [(tile.position - tile.own.start * axis.dilation) * step for tile in found]
            ends = [(*_ends(tile.own), at, *_ends(tile.other)) for tile, at in zip(found, first, strict=True)]
            tables.append(torch.tensor(ends))
    numbers = [axis.dilation * step for axis, step in zip(axes, apart, strict=True)]
    numbers += [axis.reach for axis in axes] + counts
    numbers += accumulate((table.numel() for table in tables[:-1]), initial=_HEADER)
    plan = torch.cat([torch.tensor(numbers), *(table.flatten() for table in tables)])
    return plan.to(device, torch.int32), prod(counts[:3]), prod(counts[3:])


def _ends(span: range) -> tuple[int, int]:
    return span.start, span.stop
