"""Tiles of the GPU kernels by chip and by the width of a token; chosen by compiling, not yet by timing.

A program keeps `own` tokens and steps over `other` ones. Tiles divide blocks, so that small blocks make them smaller.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from zoo.kernels.chips import tuned


class Tile(NamedTuple):
    """Tokens that a program keeps, tokens of a step, warps, and steps that are loaded ahead."""

    own: int
    other: int
    warps: int
    stages: int


# Chip -> bytes of a token, up to -> tile. What limits: registers, and shared memory above all on 89.
Table = Mapping[int, Mapping[int, Tile]]
FORWARD: Table = {
    80: {128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2), 512: Tile(64, 32, 4, 2), 1024: Tile(16, 16, 4, 1)},
    89: {128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2), 512: Tile(64, 16, 4, 2), 1024: Tile(16, 16, 4, 1)},
    90: {128: Tile(128, 64, 8, 3), 256: Tile(128, 64, 8, 2), 512: Tile(64, 64, 4, 2), 1024: Tile(32, 32, 4, 1)},
    100: {128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2), 512: Tile(64, 64, 4, 2), 1024: Tile(32, 32, 4, 1)},
}
BACKWARD_QUERIES: Table = {
    80: {128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 4, 2), 512: Tile(32, 32, 4, 1), 1024: Tile(16, 16, 4, 1)},
    89: {128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 4, 2), 512: Tile(32, 16, 4, 1), 1024: Tile(16, 16, 4, 1)},
    90: {128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 4, 2), 512: Tile(64, 32, 4, 1), 1024: Tile(16, 16, 4, 1)},
}
BACKWARD_KEYS: Table = {
    80: {128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2), 512: Tile(32, 32, 4, 1), 1024: Tile(16, 16, 4, 1)},
    89: {128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2), 512: Tile(32, 16, 4, 1), 1024: Tile(16, 16, 4, 1)},
    90: {128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2), 512: Tile(64, 32, 4, 1), 1024: Tile(16, 16, 4, 1)},
    100: {128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2), 512: Tile(64, 32, 4, 1), 1024: Tile(16, 16, 4, 1)},
}
STATISTIC: Table = {
    80: {128: Tile(128, 128, 8, 2), 256: Tile(64, 64, 4, 2), 512: Tile(32, 32, 4, 2), 1024: Tile(16, 16, 4, 1)},
    90: {128: Tile(128, 128, 8, 2), 256: Tile(128, 128, 8, 2), 512: Tile(64, 64, 4, 1), 1024: Tile(32, 32, 4, 1)},
}


def tile(table: Table, x: Tensor, width: int, own: int | None, other: int | None) -> Tile:
    """What a launch uses.

    Args:
        table: of one kernel.
        x: a tensor whose device and dtype decide.
        width: numbers of the widest token.
        own: size of the blocks of kept tokens, a multiple of 16; None where blocks do not matter.
        other: size of the blocks of tokens to step over.
    """
    size = max(16, 1 << (width - 1).bit_length()) * x.element_size()
    by_size = tuned(table, x)
    most = by_size[min(limit for limit in by_size if limit >= min(size, max(by_size)))]
    kept, step = (
        limit if block is None else min(limit, block & -block)  # the largest power of two that divides it
        for limit, block in ((most.own, own), (most.other, other))
    )
    return Tile(kept, step, max(1, most.warps * kept // most.own), most.stages)
