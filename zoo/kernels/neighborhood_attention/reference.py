"""The definition, every pair of tokens at once; the oracle for the other implementations."""

import torch
from torch import Tensor

from .plan import Geometry, pairs, spans, tokens


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    bias: Tensor | None,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor]:
    everywhere = [range(axis.length) for axis in geometry.axes]
    seen, row = (x.to(q.device) for x in pairs(geometry, everywhere, everywhere))  # n m
    order = tokens(geometry.axes, [spans(axis).position for axis in geometry.axes]).to(q.device)
    queries, keys, values = (t.double()[:, :, order] for t in (q, k, v))

    logits = scale * queries @ keys.mT  # b heads n m
    if bias is not None:
        logits = logits + bias.double().flatten(1)[:, row]
    logits = logits.masked_fill(~seen, -torch.inf)
    if extra_k is not None and extra_v is not None:
        logits = torch.cat([logits, scale * queries @ extra_k.double().mT], -1)
        values = torch.cat([values, extra_v.double()], 2)

    back = order.argsort()
    out, lse = (logits.softmax(-1) @ values)[:, :, back], logits.logsumexp(-1)[:, :, back]
    return out.to(q.dtype), lse.to(torch.promote_types(q.dtype, torch.float32))
