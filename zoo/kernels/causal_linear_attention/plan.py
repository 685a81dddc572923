"""How the GPU cuts tokens into chunks and chunks into tiles."""

from typing import NamedTuple

from torch import Tensor

from zoo.kernels.chips import tuned

from .tuning import TILES


class Plan(NamedTuple):
    """Numbers for the launches of one call.

    Attributes:
        chunks: stretches of tokens with a state of their own between them.
        tiles: tiles of a chunk, more than one only where `own`.
        span: tokens of a chunk.
        block: tokens of a block in a tile.
        own: whether a block is longer than a tile and a chunk of its own.
        rows: rows of a tile.
        padded: rows of a tile that each block takes, a power of two.
        wide: d rounded up to a power of two.
        values: columns of values that a program takes.
        warps: of a program.
    """

    chunks: int
    tiles: int
    span: int
    block: int
    own: bool
    rows: int
    padded: int
    wide: int
    values: int
    warps: int


def plan(q: Tensor, v: Tensor, block: int) -> Plan:
    """Cut the tokens of `q` into whole blocks."""
    tile, wide = tuned(TILES, q), max(16, _power_of_two(q.shape[3]))
    rows = min(64, max(16, tile.numbers // wide))
    values = min(rows, max(16, _power_of_two(v.shape[3])))
    if block > rows:
        return Plan(
            _count(q.shape[2], block), _count(block, rows), block, rows, True, rows, rows, wide, values, tile.warps
        )
    padded = _power_of_two(block)
    span = rows // padded * block
    return Plan(_count(q.shape[2], span), 1, span, block, False, rows, padded, wide, values, tile.warps)


def _power_of_two(x: int) -> int:
    return 1 << (x - 1).bit_length()


def _count(length: int, piece: int) -> int:
    return -(-length // piece)
