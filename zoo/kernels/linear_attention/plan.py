"""How the GPU goes over the tokens: in tiles, and in spans of tiles that one program takes."""

from typing import NamedTuple

import torch
from torch import Tensor

from zoo.kernels.chips import tuned

from .tuning import PROGRAMS, TILES, Tile


class Pass(NamedTuple):
    """How one pass goes over the tokens."""

    tile: Tile
    spans: int  # per head
    size: int  # tokens of a span
    order: Tensor | None  # segment, first token and end of each span, int32 (spans, 3)
    first: Tensor | None  # first span of each segment, and their number, int32 (segments + 1,)


def plan(x: Tensor, width: int, cu_seqlens: Tensor | None, least: int) -> Pass:
    """Spans of at least `least` times the rows of a tile, so many that they fill the chip."""
    b, heads, n, _ = x.shape
    table = tuned(TILES, x)
    tile = table[min((side for side in table if side >= width), default=max(table))]
    if x.element_size() > 2:  # so that tiles take no more room in shared memory
        tile = tile._replace(rows=max(16, tile.rows // 2), sums=64, stages=1)
    size = tile.rows * max(least, -(-n * b * heads // (PROGRAMS * tile.rows)))
    if cu_seqlens is None:
        return Pass(tile, max(1, -(-n // size)), size, None, None)
    # Without a look at the borders, which would be a wait: every segment may end in a span that is not full.
    segments = len(cu_seqlens) - 1
    spans, cu_seqlens = n // size + segments, cu_seqlens.int().clamp(0, n)  # nobody has looked at those on a GPU
    first = torch.zeros_like(cu_seqlens)
    first[1:] = ((cu_seqlens.diff() + size - 1) // size).cumsum(0)
    p = torch.arange(spans, dtype=torch.int32, device=x.device)
    segment = torch.searchsorted(first[1:], p, right=True, out_int32=True).clamp(max=segments - 1)
    start = cu_seqlens[segment] + (p - first[segment]) * size
    stop = torch.minimum(start + size, cu_seqlens[segment + 1])
    return Pass(tile, spans, size, torch.stack([segment, start, stop], 1), first)
