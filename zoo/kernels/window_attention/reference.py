"""The definition, one window after the other; the oracle for the other implementations."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    dilation: tuple[int, int],
    shift: tuple[int, int],
    overlap: tuple[int, int],
    wrap: bool,
    order: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    pad: str,
    scale: float,
) -> Tensor:
    n = grid[0] * grid[1]
    cell = window[0] * dilation[0], window[1] * dilation[1]
    size = -(-grid[0] // cell[0]) * cell[0], -(-grid[1] // cell[1]) * cell[1]
    bias = 0.0
    if bias_table is not None and bias_index is not None:
        bias = bias_table.double()[bias_index % len(bias_table)].permute(2, 0, 1)  # heads n m
    places = torch.arange(n, device=q.device) if order is None else order
    places = places.expand(q.shape[:3])[..., None]  # b heads n 1

    # Token n is the zero token that stands for all padding.
    queries, keys, values = (F.pad(t.double().take_along_dim(places, 2), (0, 0, 0, 1)) for t in (q, k, v))
    out = torch.zeros_like(values)
    corners = (
        [top + i for top in range(0, s, c) for i in range(d)] for s, c, d in zip(size, cell, dilation, strict=True)
    )
    for corner in product(*corners):
        inside, came_inside = _tokens(corner, window, dilation, (0, 0), shift, grid, size, q.device)
        seen, came_seen = _tokens(corner, window, dilation, overlap, shift, grid, size, q.device)
        allowed = (came_inside[:, None] == came_seen[None]).all(-1) | wrap  # n m
        if pad == "mask":
            allowed = allowed & (seen < n)
        allowed = allowed | (inside == n)[:, None]  # a padded query is thrown away, whatever it sees
        logits = scale * queries[:, :, inside] @ keys[:, :, seen].mT + bias  # b heads n m
        p = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        out = out.index_copy(2, inside, p @ values[:, :, seen])
    return torch.zeros_like(out[:, :, :n]).scatter(2, places.expand(v.shape), out[:, :, :n]).to(q.dtype)


def _tokens(
    corner: tuple[int, ...],
    window: tuple[int, int],
    dilation: tuple[int, int],
    reach: tuple[int, int],
    shift: tuple[int, int],
    grid: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Places (m,) of the window at `corner` of the rolled map, and the borders that each came around, (m, 2)."""
    tokens, came = [], []
    for i, j in product(*(range(-r, s + r) for r, s in zip(reach, window, strict=True))):
        y, x = corner[0] + shift[0] + i * dilation[0], corner[1] + shift[1] + j * dilation[1]
        around = [shift[0] > 0 and y >= size[0], shift[1] > 0 and x >= size[1]]
        row, column = y - around[0] * size[0], x - around[1] * size[1]
        in_map = 0 <= row < grid[0] and 0 <= column < grid[1]
        tokens.append(row * grid[1] + column if in_map else grid[0] * grid[1])
        came.append(around)
    return torch.tensor(tokens, device=device), torch.tensor(came, device=device)
