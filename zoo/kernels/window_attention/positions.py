"""Relative positions between the tokens of a window, in the official numbering of Swin and HAT.

Models store these tables as buffers, so they are kept to the number: the overlapping one goes below zero.
"""

import torch
from torch import Tensor


def relative_position_index(window: int | tuple[int, int]) -> Tensor:
    """Rows of a ((2 wh - 1) (2 ww - 1), heads) bias table for self-attention inside a window.

        index[query, key] = (y_query - y_key + wh - 1) (2 ww - 1) + (x_query - x_key + ww - 1)

    Args:
        window: height and width in tokens, or one number for both.

    Returns:
        (wh ww, wh ww) int64 on the CPU, in [0, (2 wh - 1) (2 ww - 1)).

    Source: Swin Transformer; `relative_position_index_SA` of HAT; both branches of CRAFT.
    """
    height, width = (window, window) if isinstance(window, int) else window
    y, x = _coordinates(height, width)
    dy = y[:, None] - y[None, :] + height - 1  # n m
    dx = x[:, None] - x[None, :] + width - 1  # n m
    return dy * (2 * width - 1) + dx


def overlapping_position_index(window: int, key_window: int) -> Tensor:
    """Rows of a ((window + key_window - 1)^2, heads) bias table for a window that looks at a larger one.

        index[query, key] = (dy + window - key_window + 1) (window + key_window - 1) + (dx + window - key_window + 1)

    with dy, dx = key minus query, keys counted from 0 to key_window - 1 and queries from 0 to window - 1. A part of it
    is negative: modulo the number of rows it names every row once, which is how `window_attention` reads it.

    Args:
        window: side of the query window in tokens.
        key_window: side of the key window in tokens.

    Returns:
        (window^2, key_window^2) int64 on the CPU.

    Source: `relative_position_index_OCA` of HAT.
    """
    query_y, query_x = _coordinates(window, window)
    key_y, key_x = _coordinates(key_window, key_window)
    first = window - key_window + 1
    dy = key_y[None, :] - query_y[:, None] + first  # n m
    dx = key_x[None, :] - query_x[:, None] + first  # n m
    return dy * (window + key_window - 1) + dx


def _coordinates(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token in raster order, (height width,) each."""
    token = torch.arange(height * width, device="cpu")
    return token // width, token % width
