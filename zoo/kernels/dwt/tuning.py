"""Tiles of the GPU kernels by chip."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Results of one program and band, and its warps."""

    results: int
    warps: int


TILES = {80: Tile(512, 4)}
