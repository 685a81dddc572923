"""One key for each cell of the grid: a weighted sum of the tokens in it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pool_cells(x: Tensor, grid: Sequence[int], weights: Tensor) -> Tensor:
    """Sum the tokens of each whole cell, weighed by their places in it; tokens beyond the last one are left out.

    Args:
        x: tokens, (b, heads, n, d).
        grid: tokens along each axis, in raster order.
        weights: by place in a cell, one axis each; (4, 4) for cells of 4 x 4 tokens.

    Returns:
        (b, heads, cells, d), dtype of `x`, summed in float32 or wider.
    """
    cells = [length // size for length, size in zip(grid, weights.shape, strict=True)]
    x = x.unflatten(2, tuple(grid))  # b heads h w d
    for place, (count, size) in enumerate(zip(cells, weights.shape, strict=True)):
        x = x.narrow(2 + 2 * place, 0, count * size).unflatten(2 + 2 * place, (count, size))
    # b heads ch fh cw fw d
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = weights.to(wide).view([n for size in weights.shape for n in (1, size)] + [1])
    summed = (x.to(wide) * factors).sum([3 + 2 * place for place in range(len(cells))])
    return summed.flatten(2, -2).to(x.dtype)
