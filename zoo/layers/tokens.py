"""Feature maps as tokens and back: views, no copies, while maps lie in channels-last memory."""

from torch import Tensor


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens (b, n, c) as a feature map (b, c, h, w) in channels-last memory; a view."""
    # In another order torch makes up a stride for a batch of one, and convolutions then copy to channels-first.
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def to_tokens(features: Tensor) -> Tensor:
    """A feature map (b, c, h, w) as tokens (b, n, c); a view when the map lies in channels-last memory."""
    return features.flatten(2).transpose(1, 2)
