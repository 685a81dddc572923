"""Attention over two sets of keys from the attention over each."""

import torch
from torch import Tensor


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Join two results for the same queries over disjoint sets of keys. Differentiable in all four.

        lse = log(exp(lse1) + exp(lse2))        o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2

    Args:
        o1: output over the first set, (..., n, e).
        lse1: log of its normaliser, (..., n), natural; -inf where a query saw nothing.
        o2: output over the second set, shape of `o1`.
        lse2: log of its normaliser, shape of `lse1`.

    Returns:
        Output over both, dtype of `o1`, and its lse, float32 or wider; zeros and -inf where neither saw anything.

    Raises:
        ValueError: shapes disagree.

    Source: online softmax (Milakov & Gimelshein 2018), as used between the devices of ring attention.
    """
    if o1.shape != o2.shape or lse1.shape != lse2.shape or lse1.shape != o1.shape[:-1]:
        raise ValueError(
            f"merge: o1 and o2 must be (..., n, e), lse1 and lse2 (..., n), "
            f"got {tuple(o1.shape)}, {tuple(o2.shape)}, {tuple(lse1.shape)}, {tuple(lse2.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(o1.dtype, lse1.dtype), torch.float32)
    lse1, lse2 = lse1.to(wide), lse2.to(wide)
    most = torch.maximum(lse1, lse2).detach()
    nothing = most == -torch.inf
    most = most.masked_fill(nothing, 0)  # -inf - -inf is NaN
    w1, w2 = (lse1 - most).exp(), (lse2 - most).exp()
    total = (w1 + w2).masked_fill(nothing, 1)
    o = (w1 / total)[..., None] * o1.to(wide) + (w2 / total)[..., None] * o2.to(wide)
    return o.to(o1.dtype), (most + total.log()).masked_fill(nothing, -torch.inf)
