"""Two passes over tokens: `zoo::linear_attention_sum` makes the state, `zoo::linear_attention_read` reads it.

A program of a pass takes a span of the tokens of one head. Sums over spans are stored side by side and added by a
kernel of their own, in one order: no atomics, so that gradients are the same in every run.

Gradients of sums are a reading of the gradients of the state, and the other way round:

    sum   S = sum_j f(k_j) v_j^T, z = sum_j f(k_j)    df_j = dS v_j + dz, dv_j = dS^T f(k_j)
    read  o_i = f(q_i) S / c_i, c_i = f(q_i) . z + eps    dS = sum_i f(q_i) / c_i do_i^T, dz = sum_i dc_i f(q_i)
          df_i = S do_i / c_i + dc_i z, dc_i = -f(q_i) . S do_i / c_i^2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.rounding import dot, load, store

from .features import softmax_features
from .plan import Pass, plan
from .state import between

# What is computed from half-precision tokens is multiplied as tf32: f(k) and S rounded to bf16 would cost more digits
# than softmax attention loses, and float16 overflow. Tokens stay exact. For float32 tf32 would be too coarse.
_PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


@triton.jit
def _features(x, map_eps: tl.constexpr, inside, MAP: tl.constexpr):
    if MAP == "elu1":
        x = tl.where(x < 0, tl.exp(tl.minimum(x, 0.0)), x + 1)  # this way around NaN stays NaN
    elif MAP == "relu":
        x = tl.where(x < 0, 0.0, x)
    return tl.where(inside, x + map_eps, 0.0)


@triton.jit
def _slope(x, MAP: tl.constexpr):
    if MAP == "elu1":
        x = tl.exp(tl.minimum(x, 0.0))
    elif MAP == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def _program(order_ptr, spans, n, size, heads, SEGMENTED: tl.constexpr):
    """Sample, head, both in one, segment, first token and end of the span of this program."""
    p, bh = tl.program_id(0) % spans, (tl.program_id(0) // spans).to(tl.int64)
    s, start, stop = 0, p * size, tl.minimum(p * size + size, n)
    if SEGMENTED:
        s, start, stop = tl.load(order_ptr + 3 * p), tl.load(order_ptr + 3 * p + 1), tl.load(order_ptr + 3 * p + 2)
    return bh // heads, bh % heads, bh, s, start, stop


@triton.jit
def _sum_kernel(
    x_ptr, x2_ptr, y_ptr, w_ptr, wz_ptr, part_ptr, order_ptr,
    xb, xh, xn, xd, x2b, x2h, x2n, x2d, yb, yh, yn, ye,
    heads, n, d, e, spans, size, map_eps: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, WEIGHTED: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write the sums over a span, of w f2(x) y^T and of wz f(x), one behind the other."""
    b, h, bh, _, start, stop = _program(order_ptr, spans, n, size, heads, SEGMENTED)
    ds, es = tl.program_id(1) * D + tl.arange(0, D), tl.program_id(2) * E + tl.arange(0, E)
    x_ptr += b * xb + h * xh
    y_ptr += b * yb + h * yh
    sums, z = tl.zeros((D, E), tl.float32), tl.zeros((D,), tl.float32)
    for at in range(start, stop, N):
        rows = at + tl.arange(0, N)
        of_x, of_y = (rows < stop)[:, None] & (ds < d)[None, :], (rows < stop)[:, None] & (es < e)[None, :]
        f = _features(load(x_ptr, rows, xn, ds, xd, of_x), map_eps, of_x, MAP)
        f2 = load(x2_ptr + b * x2b + h * x2h, rows, x2n, ds, x2d, of_x) if SPLIT else f
        if WEIGHTED:
            f2 *= tl.load(w_ptr + bh * n + rows, mask=rows < stop, other=0.0)[:, None]
            f *= tl.load(wz_ptr + bh * n + rows, mask=rows < stop, other=0.0)[:, None]
        z += tl.sum(f, 0)
        sums = dot(tl.trans(f2), load(y_ptr, rows, yn, es, ye, of_y), sums, PRECISION)
    part_ptr += (bh * spans + tl.program_id(0) % spans) * (d * e + d)
    store(part_ptr, sums, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])
    if tl.program_id(2) == 0:
        tl.store(part_ptr + d * e + ds, z, mask=ds < d)


@triton.jit
def _add_kernel(part_ptr, out_ptr, first_ptr, spans, segments, length, SEGMENTED: tl.constexpr, BLOCK: tl.constexpr):
    """Add up the spans of a segment."""
    s, bh = tl.program_id(0) % segments, (tl.program_id(0) // segments).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = 0, spans
    if SEGMENTED:
        begin, end = tl.load(first_ptr + s), tl.load(first_ptr + s + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(begin, end):
        total += tl.load(part_ptr + (bh * spans + p) * length + column, mask=column < length, other=0.0)
    tl.store(out_ptr + (bh * segments + s) * length + column, total, mask=column < length)


@triton.jit
def _read_kernel(
    x_ptr, x2_ptr, kv_ptr, z_ptr, y_ptr, order_ptr,
    xb, xh, xn, xd, x2b, x2h, x2n, x2d, yb, yh, yn, ye,
    heads, n, d, e, spans, segments, size, map_eps: tl.constexpr, eps: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, NORMED: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write y = f2(x) kv / (f(x) . z + eps)."""
    b, h, bh, s, start, stop = _program(order_ptr, spans, n, size, heads, SEGMENTED)
    ds, es = tl.arange(0, D), tl.program_id(1) * E + tl.arange(0, E)
    x_ptr += b * xb + h * xh
    y_ptr += b * yb + h * yh
    kv = load(kv_ptr + (bh * segments + s) * d * e, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])
    if NORMED:
        z = tl.load(z_ptr + (bh * segments + s) * d + ds, mask=ds < d, other=0.0)
    for at in range(start, stop, N):
        rows = at + tl.arange(0, N)
        of_x = (rows < stop)[:, None] & (ds < d)[None, :]
        f = _features(load(x_ptr, rows, xn, ds, xd, of_x), map_eps, of_x, MAP)
        f2 = load(x2_ptr + b * x2b + h * x2h, rows, x2n, ds, x2d, of_x) if SPLIT else f
        y = dot(f2, kv, tl.zeros((N, E), tl.float32), PRECISION)
        if NORMED:
            y /= tl.where(rows < stop, tl.sum(f * z[None, :], 1) + eps, 1.0)[:, None]
        store(y_ptr, y, rows, yn, es, ye, (rows < stop)[:, None] & (es < e)[None, :])


@triton.jit
def _read_backward_kernel(
    x_ptr, x2_ptr, kv_ptr, z_ptr, dy_ptr, dx_ptr, dx2_ptr, w_ptr, wz_ptr, order_ptr,
    xb, xh, xn, xd, x2b, x2h, x2n, x2d, yb, yh, yn, ye,
    heads, n, d, e, spans, segments, size, map_eps: tl.constexpr, eps: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, NORMED: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write dx, dx2, and the weights w = 1 / c and wz = dc that a sum takes for the gradients of kv and z."""
    b, h, bh, s, start, stop = _program(order_ptr, spans, n, size, heads, SEGMENTED)
    ds = tl.arange(0, D)
    x_ptr += b * xb + h * xh
    dy_ptr += b * yb + h * yh
    kv_ptr += (bh * segments + s) * d * e
    if NORMED:
        z = tl.load(z_ptr + (bh * segments + s) * d + ds, mask=ds < d, other=0.0)
    for at in range(start, stop, N):
        rows = at + tl.arange(0, N)
        of_x = (rows < stop)[:, None] & (ds < d)[None, :]
        df2 = tl.zeros((N, D), tl.float32)
        for first in range(0, e, E):
            es = first + tl.arange(0, E)
            dy = load(dy_ptr, rows, yn, es, ye, (rows < stop)[:, None] & (es < e)[None, :])
            kv = load(kv_ptr, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])
            df2 = dot(dy, tl.trans(kv), df2, PRECISION)
        x = load(x_ptr, rows, xn, ds, xd, of_x)
        df = df2
        if NORMED:
            f = _features(x, map_eps, of_x, MAP)
            f2 = load(x2_ptr + b * x2b + h * x2h, rows, x2n, ds, x2d, of_x) if SPLIT else f
            w = 1.0 / tl.where(rows < stop, tl.sum(f * z[None, :], 1) + eps, 1.0)
            df2 *= w[:, None]
            wz = -w * tl.sum(f2 * df2, 1)
            tl.store(w_ptr + bh * n + rows, w, mask=rows < stop)
            tl.store(wz_ptr + bh * n + rows, wz, mask=rows < stop)
            df = wz[:, None] * z[None, :]
            if SPLIT:
                store(dx2_ptr + (b * n * heads + h) * d, df2, rows, heads * d, ds, 1, of_x)
            else:
                df += df2
        store(dx_ptr + (b * n * heads + h) * d, df * _slope(x, MAP), rows, heads * d, ds, 1, of_x)


@triton.jit
def _sum_backward_kernel(
    x_ptr, x2_ptr, y_ptr, dkv_ptr, dz_ptr, dx_ptr, dx2_ptr, dy_ptr, order_ptr,
    xb, xh, xn, xd, x2b, x2h, x2n, x2d, yb, yh, yn, ye,
    heads, n, d, e, spans, segments, size, map_eps: tl.constexpr,
    MAP: tl.constexpr, SPLIT: tl.constexpr, SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr, N: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Write dx and dx2 from df2 = y dkv^T and df = dz beside it, and dy = f2(x) dkv; all as (d, tokens).

    Of two products in one loop Triton shares the first axis among warps, which is the longer one then.
    """
    b, h, bh, s, start, stop = _program(order_ptr, spans, n, size, heads, SEGMENTED)
    ds = tl.arange(0, D)
    x_ptr += b * xb + h * xh
    y_ptr += b * yb + h * yh
    dkv_ptr += (bh * segments + s) * d * e
    dz = tl.load(dz_ptr + (bh * segments + s) * d + ds, mask=ds < d, other=0.0)
    for at in range(start, stop, N):
        rows = at + tl.arange(0, N)
        of_x = (ds < d)[:, None] & (rows < stop)[None, :]
        x = load(x_ptr, ds, xd, rows, xn, of_x)
        f2 = _features(x, map_eps, of_x, MAP)
        if SPLIT:
            f2 = load(x2_ptr + b * x2b + h * x2h, ds, x2d, rows, x2n, of_x)
        df2 = tl.zeros((D, N), tl.float32)
        for first in range(0, e, E):
            es = first + tl.arange(0, E)
            of_y = (es < e)[:, None] & (rows < stop)[None, :]
            dkv = load(dkv_ptr, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])
            df2 = dot(dkv, load(y_ptr, es, ye, rows, yn, of_y), df2, PRECISION)
            dy = dot(tl.trans(dkv), f2, tl.zeros((E, N), tl.float32), PRECISION)
            store(dy_ptr + (b * n * heads + h) * e, dy, es, 1, rows, heads * e, of_y)
        df = df2 + dz[:, None]
        if SPLIT:
            df = tl.zeros((D, N), tl.float32) + dz[:, None]
            store(dx2_ptr + (b * n * heads + h) * d, df2, ds, 1, rows, heads * d, of_x)
        store(dx_ptr + (b * n * heads + h) * d, df * _slope(x, MAP), ds, 1, rows, heads * d, of_x)


@torch.library.custom_op("zoo::linear_attention_sum", mutates_args=())
def _sum(
    x: Tensor, x2: Tensor | None, y: Tensor, w: Tensor | None, wz: Tensor | None, cu_seqlens: Tensor | None,
    feature_map: str, map_eps: float,
) -> Tensor:  # fmt: skip
    (b, heads, n, d), e = x.shape, y.shape[3]
    length, out = d * e + d, _empty_sums(x, y, cu_seqlens)
    if not n:
        return out.zero_()
    how, other = plan(x, max(d, e), cu_seqlens, least=16), x if x2 is None else x2
    part = out if how.spans == 1 else out.new_empty(b, heads, how.spans, length)
    tile_d, tile_e = (min(how.tile.sums, max(16, triton.next_power_of_2(width))) for width in (d, e))
    if out.numel():
        _sum_kernel[how.spans * b * heads, triton.cdiv(d, tile_d), triton.cdiv(e, tile_e)](
            x, other, y, w, wz, part, how.order, *x.stride(), *other.stride(), *y.stride(),
            heads, n, d, e, how.spans, how.size, map_eps,
            WEIGHTED=w is not None, **_options(y.dtype, how, d, e, feature_map, x2) | {"D": tile_d, "E": tile_e},
        )  # fmt: skip
    if out.numel() and part is not out:
        _add_kernel[out.numel() // length, triton.cdiv(length, 512)](
            part, out, how.first, how.spans, out.shape[2], length, SEGMENTED=how.first is not None, BLOCK=512
        )
    return out


@_sum.register_fake
def _(x, x2, y, w, wz, cu_seqlens, feature_map, map_eps):
    return _empty_sums(x, y, cu_seqlens)


@torch.library.custom_op("zoo::linear_attention_sum_backward", mutates_args=())
def _sum_backward(
    dsums: Tensor, k: Tensor, k2: Tensor | None, v: Tensor, cu_seqlens: Tensor | None, feature_map: str, map_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    (b, heads, n, d), e = k.shape, v.shape[3]
    dk, dk2, dv = _empty(k, d), _empty(k2, d), _empty(v, e)
    if dk.numel():
        how, other = plan(k, max(d, e), cu_seqlens, least=2), k if k2 is None else k2
        _sum_backward_kernel[(how.spans * b * heads,)](
            k, other, v, *(t.contiguous() for t in _split(dsums, d, e)), dk, dk2, dv, how.order,
            *k.stride(), *other.stride(), *v.stride(), heads, n, d, e, how.spans, dsums.shape[2], how.size, map_eps,
            **_options(v.dtype, how, d, e, feature_map, k2),
        )  # fmt: skip
    return dk, dk2, dv


@_sum_backward.register_fake
def _(dsums, k, k2, v, cu_seqlens, feature_map, map_eps):
    return _empty(k, k.shape[3]), _empty(k2, k.shape[3]), _empty(v, v.shape[3])


@torch.library.custom_op("zoo::linear_attention_read", mutates_args=())
def _read(
    q: Tensor, q2: Tensor | None, kv: Tensor, z: Tensor | None, cu_seqlens: Tensor | None, feature_map: str,
    map_eps: float, eps: float,
) -> Tensor:  # fmt: skip
    (b, heads, n, d), e = q.shape, kv.shape[4]
    out = _empty(q, e)
    if out.numel():
        how, other = plan(q, max(d, e), cu_seqlens, least=2), q if q2 is None else q2
        options = _options(q.dtype, how, d, e, feature_map, q2)
        _read_kernel[how.spans * b * heads, triton.cdiv(e, options["E"])](
            q, other, kv.contiguous(), z if z is None else z.contiguous(), out, how.order,
            *q.stride(), *other.stride(), *out.stride(), heads, n, d, e, how.spans, kv.shape[2], how.size,
            map_eps, eps, NORMED=z is not None, **options,
        )  # fmt: skip
    return out


@_read.register_fake
def _(q, q2, kv, z, cu_seqlens, feature_map, map_eps, eps):
    return _empty(q, kv.shape[4])


@torch.library.custom_op("zoo::linear_attention_read_backward", mutates_args=())
def _read_backward(
    dout: Tensor, q: Tensor, q2: Tensor | None, kv: Tensor, z: Tensor | None, cu_seqlens: Tensor | None,
    feature_map: str, map_eps: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (b, heads, n, d), e = q.shape, kv.shape[4]
    dq, dq2 = _empty(q, d), _empty(q2, d)
    w, wz = (None if z is None else z.new_empty(b, heads, n) for _ in range(2))
    if dq.numel():
        how, other = plan(q, max(d, e), cu_seqlens, least=2), q if q2 is None else q2
        _read_backward_kernel[(how.spans * b * heads,)](
            q, other, kv.contiguous(), z if z is None else z.contiguous(), dout, dq, dq2, w, wz, how.order,
            *q.stride(), *other.stride(), *dout.stride(), heads, n, d, e, how.spans, kv.shape[2], how.size,
            map_eps, eps, NORMED=z is not None, **_options(q.dtype, how, d, e, feature_map, q2),
        )  # fmt: skip
    return dq, dq2, _sum(q, q2, dout, w, wz, cu_seqlens, feature_map, map_eps)


@_read_backward.register_fake
def _(dout, q, q2, kv, z, cu_seqlens, feature_map, map_eps, eps):
    return _empty(q, q.shape[3]), _empty(q2, q.shape[3]), _empty_sums(q, dout, cu_seqlens)


def _options(dtype, how: Pass, d: int, e: int, feature_map: str, x2: Tensor | None) -> dict[str, object]:
    return {
        "MAP": feature_map,
        "SPLIT": x2 is not None,
        "SEGMENTED": how.order is not None,
        "PRECISION": _PRECISION[dtype],
        "N": how.tile.rows,
        "D": max(16, triton.next_power_of_2(d)),
        "E": min(how.tile.side, max(16, triton.next_power_of_2(e))),
        "num_warps": how.tile.warps,
        "num_stages": how.tile.stages,
    }


def _empty(x: Tensor | None, width: int) -> Tensor:
    """Heads next to the features, as the projections around the attention want them; nothing for nothing."""
    if x is None:
        return torch.empty(0)
    b, heads, n, _ = x.shape
    return x.new_empty(b, n, heads, width).transpose(1, 2)


def _empty_sums(x: Tensor, y: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    segments, (d, e) = 1 if cu_seqlens is None else len(cu_seqlens) - 1, (x.shape[3], y.shape[3])
    return x.new_empty(*x.shape[:2], segments, d * e + d, dtype=torch.float32)


def _split(sums: Tensor, d: int, e: int) -> tuple[Tensor, Tensor]:
    return sums[..., : d * e].unflatten(-1, (d, e)), sums[..., d * e :]


def _save(ctx, inputs, output):
    tensors = [t for t in inputs if t is None or isinstance(t, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.options = inputs[len(tensors) :]


def _grad_sum(ctx, dsums):
    k, k2, v, _, _, cu_seqlens = ctx.saved_tensors
    dk, dk2, dv = _sum_backward(dsums, k, k2, v, cu_seqlens, *ctx.options)
    return dk, None if k2 is None else dk2, dv, None, None, None, None, None


def _grad_read(ctx, dout):
    _, q2, kv, z, _ = ctx.saved_tensors
    dq, dq2, dsums = _read_backward(dout, *ctx.saved_tensors, *ctx.options)
    dkv, dz = _split(dsums, *kv.shape[3:])
    return dq, None if q2 is None else dq2, dkv, None if z is None else dz, None, None, None, None


_sum.register_autograd(_grad_sum, setup_context=_save)
_read.register_autograd(_grad_read, setup_context=_save)


def forward(q, k, v, q2, k2, feature_map, map_eps, divisors, eps, cu_seqlens, before) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    if feature_map == "softmax_qk":
        q, k = softmax_features(q, k, cu_seqlens)
        feature_map = "identity"
    sums = _sum(k, k2, v, None, None, cu_seqlens, feature_map, map_eps)
    kv, z, *shares = between(*_split(sums, k.shape[3], v.shape[3]), divisors, cu_seqlens is not None, before)
    return _read(q, q2, *shares, cu_seqlens, feature_map, map_eps, eps).to(dtype), kv, z
