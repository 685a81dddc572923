"""Tiles of the GPU kernels by chip and by the width of a token."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys at a time, and how they are launched."""

    queries: int
    keys: int
    warps: int
    stages: int


# By chip, then by bytes of a row of q or v, padded to a power of two: tiles of forward, dq, dk with dv, and biases.
# No chip was at hand: the largest that the compiler fits into registers, bf16 or fp16, where a window has 256 tokens.
_WIDE = {  # too wide for more
    512: (Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 16, 4, 1)),
    1024: (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}
TILES = {
    80: {
        64: (Tile(64, 128, 8, 1), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1), Tile(64, 64, 8, 1)),
        128: (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 1), Tile(64, 64, 8, 1)),
        256: (Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1)),
    }
    | _WIDE,
    90: {
        64: (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
        128: (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(32, 64, 4, 1), Tile(64, 64, 8, 1)),
        256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 32, 4, 1), Tile(64, 32, 4, 1)),
    }
    | _WIDE,
    100: {
        64: (Tile(64, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
        128: (Tile(64, 64, 4, 2), Tile(64, 64, 8, 1), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
        256: (Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1), Tile(64, 32, 4, 1)),
    }
    | _WIDE,
}
PROGRAMS = 1024  # wanted at once; where there are more windows than that, a program takes several
