"""The definition, one segment after the other; the oracle for the other implementations."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    feature_map: str,
    map_eps: float,
    divisors: tuple[Tensor | float, Tensor | float | None],
    eps: float,
    cu_seqlens: Tensor | None,
    before: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    borders = None if cu_seqlens is None else cu_seqlens.tolist()
    spans = [slice(None)] if borders is None else [slice(start, stop) for start, stop in pairwise(borders)]
    outs, kvs, zs = [], [], []
    for s, span in enumerate(spans):
        fq = _map(q[:, :, span].double(), feature_map, -1) + map_eps
        fk = _map(k[:, :, span].double(), feature_map, -2) + map_eps
        numerator_q = fq if q2 is None else q2[:, :, span].double()
        numerator_k = fk if k2 is None else k2[:, :, span].double()
        kv = numerator_k.mT @ v[:, :, span].double()  # b heads d e
        z = fk.sum(2)  # b heads d
        if before is not None:
            kv, z = (sums + (t if borders is None else t[:, :, s]) for sums, t in zip((kv, z), before, strict=True))
        out, by_z = numerator_q @ kv / _of_segment(divisors[0], s), divisors[1]
        outs.append(out if by_z is None else out / ((fq @ z[..., None]) / _of_segment(by_z, s) + eps))
        kvs.append(kv)
        zs.append(z)
    wide = torch.promote_types(q.dtype, torch.float32)
    kv, z = (kvs[0], zs[0]) if borders is None else (torch.stack(kvs, 2), torch.stack(zs, 2))
    return torch.cat(outs, 2).to(q.dtype), kv.to(wide), z.to(wide)


def _of_segment(divisor: Tensor | float, s: int) -> Tensor | float:
    return divisor[s] if isinstance(divisor, Tensor) and divisor.ndim else divisor


def _map(x: Tensor, feature_map: str, axis: int) -> Tensor:
    if feature_map == "elu1":
        return F.elu(x) + 1
    if feature_map == "relu":
        return x.relu()
    return x if feature_map == "identity" else x.softmax(axis)
