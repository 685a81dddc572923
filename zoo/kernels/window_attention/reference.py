"""The definition, one window after the other; the oracle for the other implementations."""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    overlap: tuple[int, int],
    wrap: bool,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    pad: str,
    scale: float,
) -> Tensor:
    n, size = grid[0] * grid[1], (-(-grid[0] // window[0]) * window[0], -(-grid[1] // window[1]) * window[1])
    bias = 0.0
    if bias_table is not None and bias_index is not None:
        bias = bias_table.double()[bias_index % len(bias_table)].permute(2, 0, 1)  # heads n m

    # Token n is the zero token that stands for all padding.
    queries, keys, values = (F.pad(t.double(), (0, 0, 0, 1)) for t in (q, k, v))
    out = torch.zeros_like(values)
    for top in range(0, size[0], window[0]):
        for left in range(0, size[1], window[1]):
            inside, came_inside = _tokens((top, left), window, (0, 0), shift, grid, size, q.device)
            seen, came_seen = _tokens((top, left), window, overlap, shift, grid, size, q.device)
            allowed = (came_inside[:, None] == came_seen[None]).all(-1) | wrap  # n m
            if pad == "mask":
                allowed = allowed & (seen < n)
            allowed = allowed | (inside == n)[:, None]  # a padded query is thrown away, whatever it sees
            logits = scale * queries[:, :, inside] @ keys[:, :, seen].mT + bias  # b heads n m
            p = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
            out = out.index_copy(2, inside, p @ values[:, :, seen])
    return out[:, :, :n].to(q.dtype)


def _tokens(
    corner: tuple[int, int],
    window: tuple[int, int],
    reach: tuple[int, int],
    shift: tuple[int, int],
    grid: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Tokens (m,) of the window at `corner` of the rolled map, and the borders that each came around, (m, 2)."""
    tokens, came = [], []
    for y in range(corner[0] + shift[0] - reach[0], corner[0] + shift[0] + window[0] + reach[0]):
        for x in range(corner[1] + shift[1] - reach[1], corner[1] + shift[1] + window[1] + reach[1]):
            around = [shift[0] > 0 and y >= size[0], shift[1] > 0 and x >= size[1]]
            row, column = y - around[0] * size[0], x - around[1] * size[1]
            in_map = 0 <= row < grid[0] and 0 <= column < grid[1]
            tokens.append(row * grid[1] + column if in_map else grid[0] * grid[1])
            came.append(around)
    return torch.tensor(tokens, device=device), torch.tensor(came, device=device)
