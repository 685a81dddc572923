"""A few tokens at a time, so that features never leave the cache; the backward computes them anew.

Two registered ops, each one pass over tokens: `_sum` makes the state of keys and values, `_read` reads it with queries.
What lies between them is as small as the state and left to autograd.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .features import features, slope, softmax_features
from .state import between

# Numbers of each tensor in work at once: 256 KiB in float32, of which a few fit into the second cache of a CPU.
_CPU_NUMBERS, _OTHER_NUMBERS = 2**16, 2**24


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
    dtype = q.dtype
    if feature_map == "softmax_qk":
        q, k = softmax_features(q, k, cu_seqlens)
        feature_map = "identity"
    kv, z = _sum(k, k2, v, cu_seqlens, feature_map, map_eps)
    kv, z, *shares = between(kv, z, divisors, cu_seqlens is not None, before)
    return _read(q, q2, *shares, cu_seqlens, feature_map, map_eps, eps).to(dtype), kv, z


@torch.library.custom_op("zoo::linear_attention_torch_sum", mutates_args=())
def _sum(
    k: Tensor, k2: Tensor | None, v: Tensor, cu_seqlens: Tensor | None, feature_map: str, map_eps: float
) -> tuple[Tensor, Tensor]:
    kv = k.new_zeros(_state_shape(k, v, cu_seqlens), dtype=_wide(k))  # b heads segments d e
    z = kv.new_zeros(kv.shape[:-1])
    with torch.autocast(k.device.type, enabled=False):
        for i, s, span in _spans(k, cu_seqlens):
            f = features(_take(k, i, span), feature_map, map_eps)  # heads c d
            z[i, :, s] += f.sum(1)
            kv[i, :, s].baddbmm_((f if k2 is None else _take(k2, i, span)).mT, _take(v, i, span))
    return kv, z


@_sum.register_fake
def _(
    k: Tensor, k2: Tensor | None, v: Tensor, cu_seqlens: Tensor | None, feature_map: str, map_eps: float
) -> tuple[Tensor, Tensor]:
    kv = k.new_empty(_state_shape(k, v, cu_seqlens), dtype=_wide(k))
    return kv, kv.new_empty(kv.shape[:-1])


@torch.library.custom_op("zoo::linear_attention_torch_sum_backward", mutates_args=())
def _sum_backward(
    dkv: Tensor,
    dz: Tensor,
    k: Tensor,
    k2: Tensor | None,
    v: Tensor,
    cu_seqlens: Tensor | None,
    feature_map: str,
    map_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dk2 = k.new_empty(0) if k2 is None else torch.empty_like(k2)
    with torch.autocast(k.device.type, enabled=False):
        for i, s, span in _spans(k, cu_seqlens):
            x, y, m = _take(k, i, span), _take(v, i, span), dkv[i, :, s]
            f = features(x, feature_map, map_eps) if k2 is None else _take(k2, i, span)  # heads c d
            df = torch.bmm(y, m.mT)
            dv[i, :, span] = torch.bmm(f, m)
            dx = dz[i, :, s, None].expand_as(f)
            if k2 is None:
                dx = df.add_(dx)
            else:
                dk2[i, :, span] = df
            dk[i, :, span] = dx * slope(x, feature_map)
    return dk, dk2, dv


@_sum_backward.register_fake
def _(dkv: Tensor, dz: Tensor, k: Tensor, k2: Tensor | None, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(k), k.new_empty(0) if k2 is None else torch.empty_like(k2), torch.empty_like(v)


@torch.library.custom_op("zoo::linear_attention_torch_read", mutates_args=())
def _read(
    q: Tensor,
    q2: Tensor | None,
    kv: Tensor,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    map_eps: float,
    eps: float,
) -> Tensor:
    out = _empty_out(q, kv)
    with torch.autocast(q.device.type, enabled=False):
        for i, s, span in _spans(q, cu_seqlens):
            f = features(_take(q, i, span), feature_map, map_eps)  # heads c d
            y = torch.bmm(f if q2 is None else _take(q2, i, span), kv[i, :, s])
            out[i, :, span] = y if z is None else y.div_(_denominator(f, z[i, :, s], eps))
    return out


@_read.register_fake
def _(q: Tensor, q2: Tensor | None, kv: Tensor, *_: object) -> Tensor:
    return _empty_out(q, kv)


@torch.library.custom_op("zoo::linear_attention_torch_read_backward", mutates_args=())
def _read_backward(
    dout: Tensor,
    q: Tensor,
    q2: Tensor | None,
    kv: Tensor,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    feature_map: str,
    map_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dkv = torch.empty_like(q), torch.zeros_like(kv)
    dq2 = q.new_empty(0) if q2 is None else torch.empty_like(q2)
    dz = q.new_empty(0) if z is None else torch.zeros_like(z)
    with torch.autocast(q.device.type, enabled=False):
        for i, s, span in _spans(q, cu_seqlens):
            x, dy = _take(q, i, span), _take(dout, i, span)
            f = features(x, feature_map, map_eps)  # heads c d
            f2 = f if q2 is None else _take(q2, i, span)
            df2 = torch.bmm(dy, kv[i, :, s].mT)  # of the numerator; still times the denominator
            if z is None:
                dkv[i, :, s].baddbmm_(f2.mT, dy)
                dq[i, :, span] = df2 * slope(x, feature_map)
                continue
            scale = _denominator(f, z[i, :, s], eps).reciprocal_()  # heads c 1
            df2 *= scale
            dden = (f2 * df2).sum(-1, keepdim=True).mul_(scale).neg_()
            dkv[i, :, s].baddbmm_((f2 * scale).mT, dy)
            dz[i, :, s] += (f * dden).sum(1)
            df = dden * z[i, :, s, None]
            if q2 is None:
                df += df2
            else:
                dq2[i, :, span] = df2
            dq[i, :, span] = df.mul_(slope(x, feature_map))
    return dq, dq2, dkv, dz


@_read_backward.register_fake
def _(
    dout: Tensor, q: Tensor, q2: Tensor | None, kv: Tensor, z: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq2, dz = (q.new_empty(0) if t is None else torch.empty_like(t) for t in (q2, z))
    return torch.empty_like(q), dq2, torch.empty_like(kv), dz


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    *tensors, ctx.feature_map, ctx.map_eps = inputs
    ctx.save_for_backward(*tensors)


def _grad_sum(ctx: Any, dkv: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    k, k2, v, cu_seqlens = ctx.saved_tensors
    dk, dk2, dv = _sum_backward(dkv, dz, k, k2, v, cu_seqlens, ctx.feature_map, ctx.map_eps)
    return dk, None if k2 is None else dk2, dv, None, None, None


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    *tensors, ctx.feature_map, ctx.map_eps, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _grad_read(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    _, q2, _, z, _ = ctx.saved_tensors
    dq, dq2, dkv, dz = _read_backward(dout, *ctx.saved_tensors, ctx.feature_map, ctx.map_eps, ctx.eps)
    return dq, None if q2 is None else dq2, dkv, None if z is None else dz, None, None, None, None


_sum.register_autograd(_grad_sum, setup_context=_save_sum)
_read.register_autograd(_grad_read, setup_context=_save_read)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _take(x: Tensor, sample: int, span: slice) -> Tensor:
    """Some tokens in float32 or wider, (heads, c, d)."""
    return x[sample, :, span].to(_wide(x))


def _state_shape(k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, ...]:
    return (*k.shape[:2], 1 if cu_seqlens is None else len(cu_seqlens) - 1, k.shape[3], v.shape[3])


def _empty_out(q: Tensor, kv: Tensor) -> Tensor:
    """Heads next to the features, as the projection after the attention wants them."""
    b, heads, n, _ = q.shape
    return q.new_empty(b, n, heads, kv.shape[-1]).transpose(1, 2)


def _spans(x: Tensor, cu_seqlens: Tensor | None) -> Iterator[tuple[int, int, slice]]:
    """Sample, segment and some tokens of it, (b, heads, n, d) at a time small enough for the cache."""
    b, heads, n, d = x.shape
    step = max(16, (_CPU_NUMBERS if x.device.type == "cpu" else _OTHER_NUMBERS) // max(1, heads * d))
    borders = [0, n] if cu_seqlens is None else cu_seqlens.tolist()
    for i in range(b if heads else 0):
        for s, (start, stop) in enumerate(pairwise(borders)):
            for at in range(start, stop, step):
                yield i, s, slice(at, min(at + step, stop))


def _denominator(f: Tensor, z: Tensor, eps: float) -> Tensor:
    return (f * z[:, None]).sum(-1, keepdim=True).add_(eps)  # heads c 1
