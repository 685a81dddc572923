"""Tiles of the GPU kernels by chip and by the width of a token."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Shape of tiles and how they are launched.

    Attributes:
        rows: tokens.
        side: features of values at a time, beside all those of keys.
        sums: features of keys and of values at a time where they are summed up.
        warps: of a program.
        stages: of loads ahead.
    """

    rows: int
    side: int
    sums: int
    warps: int
    stages: int


# By chip, then by the larger of d and e, at most. Up to 128 nothing spills; more than 256 works, with spills.
TILES = {
    80: {
        64: Tile(32, 64, 64, 4, 2),
        128: Tile(32, 32, 128, 8, 2),
        256: Tile(16, 32, 128, 8, 1),
        512: Tile(16, 16, 128, 8, 1),
    }
}
PROGRAMS = 1024  # that keep every multiprocessor busy; more would only store more sums
