"""Tiles of the GPU kernels by chip."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Values in a tile, and warps: of the forward and the carry, then of the second backward kernel."""

    values: int
    warps: int
    back_values: int
    back_warps: int


TILES = {80: Tile(2048, 4, 1024, 4), 100: Tile(2048, 8, 1024, 4)}  # eight warps: four spill at 32 states
VALUES = 1024  # states and tokens in a tile of one channel, if that leaves 16 to 64 tokens
PROGRAMS = 512  # of the second backward kernel, where the problem has them: four for each multiprocessor of an H100
