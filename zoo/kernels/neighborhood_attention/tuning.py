"""Tiles of the GPU kernels by chip, pass, and bytes of a head of one token."""

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys at a time, and how they are launched."""

    queries: int
    keys: int
    warps: int
    stages: int


_QUERIES = {128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2), 1024: Tile(32, 16, 4, 1)}
_KEYS = {128: Tile(32, 64, 4, 2), 256: Tile(32, 64, 8, 2), 512: Tile(16, 32, 4, 1), 1024: Tile(16, 16, 4, 1)}
# Found by compiling: nothing spills at 64 and 128 in bf16.
_AMPERE = {"forward": _QUERIES, "queries": _QUERIES, "keys": _KEYS}
_HOPPER = _AMPERE | {"forward": _QUERIES | {256: Tile(128, 64, 8, 2)}}
TILES = {80: _AMPERE, 90: _HOPPER, 100: _HOPPER | {"queries": _QUERIES | {128: Tile(128, 64, 4, 2)}}}
