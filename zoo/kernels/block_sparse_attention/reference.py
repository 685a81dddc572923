"""The definition, on the whole map of queries and keys; the oracle for the other implementations."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .plan import Choice, blocks, unpack_mask


def forward(q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    seen = _seen(q, k, choice)
    if choice.key_lengths is not None:  # what lies behind may be NaN
        behind = torch.arange(k.shape[2], device=k.device) >= choice.key_lengths[:, None]
        k, v = (t.masked_fill(behind[:, None, :, None], 0) for t in (k, v))
    nothing = ~seen.any(-1)
    logits = choice.scale * q.double() @ k.double().mT  # b heads n m
    logits = logits.masked_fill(~seen, -torch.inf).masked_fill(nothing[..., None], 0)
    lse = logits.logsumexp(-1)
    p = (logits - lse[..., None]).exp().masked_fill(nothing[..., None], 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    return (p @ v.double()).to(q.dtype), lse.masked_fill(nothing, -torch.inf).to(wide)


def statistic(q: Tensor, k: Tensor, lse: Tensor, choice: Choice, largest: bool) -> Tensor:
    seen = _seen(q, k, choice) & (lse > -torch.inf)[..., None]
    p = (choice.scale * q.double() @ k.double().mT - lse.double()[..., None]).exp().where(seen, 0)  # b heads n m
    rows, columns = (blocks(count, size) for count, size in zip(p.shape[2:], choice.block, strict=True))
    p = F.pad(p, (0, columns * choice.block[1] - p.shape[3], 0, rows * choice.block[0] - p.shape[2]))
    p = p.unflatten(3, (columns, choice.block[1])).unflatten(2, (rows, choice.block[0]))  # b heads mq bm mk bn
    return (p.amax((3, 5)) if largest else p.sum((3, 5))).to(lse.dtype)


def _seen(q: Tensor, k: Tensor, choice: Choice) -> Tensor:
    """Whether a query sees a key, (b, heads, n, m)."""
    n, m, (mask, rule, key_lengths, block, _) = q.shape[2], k.shape[2], choice
    seen = torch.ones(*q.shape[:3], m, dtype=torch.bool, device=q.device)
    if mask is not None:
        mask = unpack_mask(mask, blocks(m, block[1])) if mask.dtype == torch.uint8 else mask
        seen = seen & mask.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :n, :m]
    if rule is not None:
        seen = seen & rule.allowed[rule.query.long()][:, rule.key.long()]
    if key_lengths is not None:
        seen = seen & (torch.arange(m, device=q.device) < key_lengths[:, None])[:, None, None]
    return seen
