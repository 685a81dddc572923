"""Feature maps that act on each number, and the softmax features that act on whole axes."""

import torch
from torch import Tensor


def features(x: Tensor, feature_map: str, map_eps: float) -> Tensor:
    """f(x) of "elu1", "relu" or "identity"; never an alias of `x`."""
    positive = x if feature_map == "identity" else x.clamp(min=0)
    if feature_map == "elu1":
        # Two clamps and an exponential: less than half the time of torch.where, and small features keep their digits.
        return x.clamp(max=0).exp_().add_(positive).add_(map_eps)
    return positive + map_eps


def slope(x: Tensor, feature_map: str) -> Tensor | float:
    """Derivative of the feature map."""
    if feature_map == "identity":
        return 1.0
    return x.clamp(max=0).exp_() if feature_map == "elu1" else (x > 0).to(x.dtype)


def softmax_features(q: Tensor, k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of each query over its features, and of the keys over the tokens of their segment.

    Returns:
        Both in float32 or wider: a share of a token in a long row is below what float16 holds.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.softmax(-1, dtype=wide)
    if cu_seqlens is None:
        return q, k.softmax(-2, dtype=wide)
    k = k.to(wide)
    token = torch.arange(k.shape[2], device=k.device)
    segment = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)[:, None].expand_as(k)
    each = (*k.shape[:2], len(cu_seqlens) - 1, k.shape[3])
    top = k.detach().new_full(each, -torch.inf).scatter_reduce(2, segment, k.detach(), "amax")
    p = (k - top.gather(2, segment)).exp()
    return q, p / p.new_zeros(each).scatter_add(2, segment, p).gather(2, segment)
