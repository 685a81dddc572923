"""Tiles of the GPU kernels by chip."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Numbers in a tile of tokens or of states, and warps of a launch."""

    numbers: int
    warps: int


TILES = {80: Tile(2048, 8)}  # larger ones would spill registers in the backward
