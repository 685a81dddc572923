"""What the launches of one call of the GPU kernels have in common."""

from collections.abc import Sequence

from torch import Tensor

from zoo.kernels.chips import tuned

from .tuning import PROGRAMS, TILES, Tile


class Call:
    """Sizes of a call, as its kernels want them."""

    def __init__(self, q: Tensor, v: Tensor, order: Tensor | None, geometry: Sequence[int]) -> None:
        h, w, wh, ww, down, right, shift_y, shift_x, oh, ow, wrap, attend = geometry
        (self.b, self.heads, self.n, d), e = q.shape, v.shape[3]
        self.queries, self.keys = wh * ww, (wh + 2 * oh) * (ww + 2 * ow)
        height, width = (-(-n // cell) * cell for n, cell in ((h, wh * down), (w, ww * right)))
        rows, columns = height // wh, width // ww
        self.windows = self.b * rows * columns
        self.order = (0, 0, 0) if order is None else order.expand(q.shape[:3]).stride()
        self.where = (self.windows, rows, columns, h, w, height, width, shift_y, shift_x, down, right, self.heads)
        self.window = {"WH": wh, "WW": ww, "OH": oh, "OW": ow}
        self.widths = {"D": d, "E": e, "BLOCK_D": _block(d), "BLOCK_E": _block(e)}
        self.masks = {"SHIFTED": shift_y + shift_x > 0, "WRAP": bool(wrap), "ATTEND": bool(attend)}
        self.tiles = tuned(TILES, q)[max(64, max(_block(d), _block(e)) * q.element_size())]
        self.small = self.queries <= self.tiles[3].queries and self.keys <= self.tiles[3].keys

    def launch(
        self, tile: Tile, queries: bool = True, keys: bool = False
    ) -> tuple[tuple[int, int], dict[str, int | bool]]:
        """Programs, and constants of the launch; whether `queries` and `keys` are dealt out to programs."""
        m, n = min(tile.queries, _block(self.queries)), min(tile.keys, _block(self.keys))
        tiles = (-(-self.queries // m) if queries else 1) * (-(-self.keys // n) if keys else 1)
        share = -(-self.windows // max(1, PROGRAMS // (tiles * self.heads)))
        warps = tile.warps if (m, n) == tile[:2] else min(4, tile.warps)
        options = {"share": share, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": tile.stages}
        return (tiles * -(-self.windows // share), self.heads), options | self.widths | self.window | self.masks


def _block(size: int) -> int:
    """The next power of two that tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())
