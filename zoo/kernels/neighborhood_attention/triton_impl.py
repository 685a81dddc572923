"""A tile of the grid a program: queries meet the boxes of keys that cover the union of their windows, and backwards.

Windows come as tables by axis from `plan`, so that kernels know neither edges nor dilation; masks are computed from
coordinates. Three axes always: shorter grids have leading axes of one token. Gradients are sums in a fixed order, no
atomics: queries collect theirs first, then keys, then extra keys and the bias from parts of the queries.
Registered as `zoo::neighborhood_attention_triton`, so that torch.compile sees one node.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.rounding import INTERPRETED, narrow

from .launches import PLACES, Launch, in_rows, strides, tokens_first
from .plan import Geometry

_LOG2E = tl.constexpr(1.4426950408889634)
_STEPS, _REACH, _COUNTS, _WINDOWS, _TILES = (tl.constexpr(place) for place in PLACES)
_CHUNK = 4096  # queries that one program sums for extra keys and for the bias


@triton.jit
def _rows(ptr, token, inside, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)[None, :]
    x = tl.load(ptr + token.to(tl.int64)[:, None] * stride + d, mask=inside[:, None] & (d < D), other=0.0)
    return x.to(tl.float32) if INTERPRETED else x  # its bf16 products are wrong


@triton.jit
def _put(ptr, token, inside, stride, x, D: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)[None, :]
    tl.store(ptr + token.to(tl.int64)[:, None] * stride + d, narrow(x, ptr.dtype.element_ty), inside[:, None] & (d < D))


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")  # float32 as tf32 would lose half of its digits


@triton.jit
def _program(tiles, heads):
    index = tl.program_id(0)
    return index % tiles, (index // tiles % heads).to(tl.int64), (index // tiles // heads).to(tl.int64)


@triton.jit
def _tile(plan, index, AXIS: tl.constexpr, KEYS: tl.constexpr):
    row = plan + tl.load(plan + _TILES + 3 * KEYS + AXIS) + 5 * index
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def _tiles(plan, index, KEYS: tl.constexpr):
    """First own coordinate on each axis and behind the last, those of the other side, token at coordinates 0."""
    n1, n2 = tl.load(plan + _COUNTS + 3 * KEYS + 1), tl.load(plan + _COUNTS + 3 * KEYS + 2)
    a0, z0, c0, f0, l0 = _tile(plan, index // (n1 * n2), 0, KEYS)
    a1, z1, c1, f1, l1 = _tile(plan, index // n2 % n1, 1, KEYS)
    a2, z2, c2, f2, l2 = _tile(plan, index % n2, 2, KEYS)
    return (a0, a1, a2), (z0, z1, z2), (f0, f1, f2), (l0, l1, l2), c0 + c1 + c2


@triton.jit
def _boxes(first, last, S: tl.constexpr):
    """How many boxes lie between, on each axis."""
    return tl.cdiv(last[0] - first[0], S[0]), tl.cdiv(last[1] - first[1], S[1]), tl.cdiv(last[2] - first[2], S[2])


@triton.jit
def _box(plan, index, counts, first, last, origin, S: tl.constexpr):
    """Coordinates of the box of that index among `counts` from `first` on; which of them are inside; their tokens.

    Those outside become the last ones inside, so that their windows and biases can be read too.
    """
    lane = tl.arange(0, S[0] * S[1] * S[2])
    i0 = first[0] + index // (counts[1] * counts[2]) * S[0] + lane // (S[1] * S[2])
    i1 = first[1] + index // counts[2] % counts[1] * S[1] + lane // S[2] % S[1]
    i2 = first[2] + index % counts[2] * S[2] + lane % S[2]
    inside = (i0 < last[0]) & (i1 < last[1]) & (i2 < last[2])
    i0, i1, i2 = tl.minimum(i0, last[0] - 1), tl.minimum(i1, last[1] - 1), tl.minimum(i2, last[2] - 1)
    token = origin + i0 * tl.load(plan + _STEPS) + i1 * tl.load(plan + _STEPS + 1) + i2 * tl.load(plan + _STEPS + 2)
    return (i0, i1, i2), inside, token


@triton.jit
def _down(i):
    return i[0][:, None], i[1][:, None], i[2][:, None]


@triton.jit
def _across(i):
    return i[0][None, :], i[1][None, :], i[2][None, :]


@triton.jit
def _window(plan, i, AXIS: tl.constexpr):
    row = plan + tl.load(plan + _WINDOWS + AXIS) + 4 * i
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _windows(plan, i):
    return _window(plan, i[0], 0), _window(plan, i[1], 1), _window(plan, i[2], 2)


@triton.jit
def _axis(seen, far, row, window, i, j, reach, BOUNDS: tl.constexpr):
    start, stop, centre, _ = window
    if BOUNDS:
        seen = seen & (start <= j) & (j < stop)
    return seen, far + (j - centre) * (j - centre), row * (2 * reach + 1) + j - i + reach


@triton.jit
def _pairs(plan, radius2, windows, i, j, seen, NDIM: tl.constexpr, BOUNDS: tl.constexpr):
    """Which pairs see each other, and their rows of the table; queries along one side, keys along the other."""
    far, row = 0, 0
    if NDIM == 3:
        seen, far, row = _axis(seen, far, row, windows[0], i[0], j[0], tl.load(plan + _REACH), BOUNDS)
    if NDIM >= 2:
        seen, far, row = _axis(seen, far, row, windows[1], i[1], j[1], tl.load(plan + _REACH + 1), BOUNDS)
    seen, far, row = _axis(seen, far, row, windows[2], i[2], j[2], tl.load(plan + _REACH + 2), BOUNDS)
    return seen if radius2 is None else seen & (far < radius2), row


@triton.jit
def _biased(logits, table, seen, row):
    if table is not None:
        logits += tl.load(table + row, mask=seen, other=0.0) * _LOG2E
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _step(acc, top, total, logits, ks, vs, dos, drop, GRAD: tl.constexpr):
    """Add a tile of keys to the sum of values under the softmax, or (GRAD) to the gradient of the queries."""
    if GRAD:
        ds = tl.exp2(logits - top[:, None]) * (_dot(dos, tl.trans(vs)) - drop[:, None])
        acc += _dot(ds.to(ks.dtype), ks)
    else:
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # rows that saw no key so far
        p, old = tl.exp2(logits - safe[:, None]), tl.exp2(top - safe)
        acc, top, total = acc * old[:, None] + _dot(p.to(vs.dtype), vs), new, total * old + tl.sum(p, 1)
    return acc, top, total


@triton.jit
def _query_kernel(
    dout, q, k, v, extra_k, extra_v, table, plan, out, lse, dlse, delta, dq,
    n, heads, extras, rows, tiles, scale, radius2,
    do0, do1, do2, q0, q1, q2, k0, k1, k2, v0, v1, v2, ek0, ek1, ek2, ev0, ev1, ev2,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, NDIM: tl.constexpr, BOUNDS: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """A tile of queries forward, or (GRAD) its gradient, which leaves delta = out . dout - dlse for other kernels."""
    M: tl.constexpr = T[0] * T[1] * T[2]
    N: tl.constexpr = K[0] * K[1] * K[2]
    tile, head, image = _program(tiles, heads)
    begin, end, first, last, origin = _tiles(plan, tile, False)
    i, own, token = _box(plan, 0, (1, 1, 1), begin, end, origin, T)
    windows = _windows(plan, _down(i))
    qs = _rows(q + image * q0 + head * q1, token, own, q2, D, BD)
    k += image * k0 + head * k1
    v += image * v0 + head * v1
    out += (image * n * heads + head) * E
    stat = (image * heads + head) * n + token
    if table is not None:
        table += head * rows
    acc, total = tl.zeros([M, BD if GRAD else BE], tl.float32), tl.zeros([M], tl.float32)
    if GRAD:
        top = tl.load(lse + stat, mask=own, other=float("inf")) * _LOG2E  # what is no query has no probabilities
        dos = _rows(dout + image * do0 + head * do1, token, own, do2, E, BE)
        ys = _rows(out, token, own, heads * E, E, BE)
        drop = tl.sum(ys.to(tl.float32) * dos.to(tl.float32), 1) - tl.load(dlse + stat, mask=own, other=0.0)
        tl.store(delta + stat, drop, mask=own)
    else:
        top, dos, drop = tl.full([M], float("-inf"), tl.float32), qs, total
    counts = _boxes(first, last, K)
    for it in range(counts[0] * counts[1] * counts[2]):
        j, inside, at = _box(plan, it, counts, first, last, origin, K)
        ks, vs = _rows(k, at, inside, k2, D, BD), _rows(v, at, inside, v2, E, BE)
        seen, row = _pairs(plan, radius2, windows, _down(i), _across(j), inside[None, :], NDIM, BOUNDS)
        logits = _biased(_dot(qs, tl.trans(ks)) * (scale * _LOG2E), table, seen, row)
        acc, top, total = _step(acc, top, total, logits, ks, vs, dos, drop, GRAD)
    if extra_k is not None:
        extra_k += image * ek0 + head * ek1
        extra_v += image * ev0 + head * ev1
        for it in range(0, extras, N):
            at = it + tl.arange(0, N)
            inside = at < extras
            ks, vs = _rows(extra_k, at, inside, ek2, D, BD), _rows(extra_v, at, inside, ev2, E, BE)
            logits = tl.where(inside[None, :], _dot(qs, tl.trans(ks)) * (scale * _LOG2E), float("-inf"))
            acc, top, total = _step(acc, top, total, logits, ks, vs, dos, drop, GRAD)
    if GRAD:
        _put(dq + (image * n * heads + head) * D, token, own, heads * D, acc * scale, D, BD)
    else:
        total = tl.where(own, total, 1.0)
        _put(out, token, own, heads * E, acc / total[:, None], E, BE)
        tl.store(lse + stat, (top + tl.log2(total)) / _LOG2E, mask=own)


@triton.jit
def _key_kernel(
    dout, q, k, v, table, plan, lse, delta, dk, dv, n, heads, extras, rows, tiles, scale, radius2, CHUNK,
    do0, do1, do2, q0, q1, q2, k0, k1, k2, v0, v1, v2,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    T: tl.constexpr, K: tl.constexpr, NDIM: tl.constexpr, BOUNDS: tl.constexpr, EXTRA: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values: of a tile of the grid, or (EXTRA) of extra ones from one part of the queries."""
    M: tl.constexpr = T[0] * T[1] * T[2]
    N: tl.constexpr = K[0] * K[1] * K[2]
    tile, head, image = _program(tiles, heads)
    if EXTRA:
        at, begin = tile * N + tl.arange(0, N), tl.program_id(1) * CHUNK
        inside, end = at < extras, tl.minimum(begin + CHUNK, n)
        steps = tl.cdiv(end - begin, M)
        part = tl.program_id(1) * (tl.num_programs(0) // tiles).to(tl.int64)  # behind those of all images and heads
        base, stride = (part + image * heads + head) * extras, 1
    else:
        begin, end, first, last, origin = _tiles(plan, tile, True)
        j, inside, at = _box(plan, 0, (1, 1, 1), begin, end, origin, K)
        counts = _boxes(first, last, T)
        steps = counts[0] * counts[1] * counts[2]
        base, stride = image * n * heads + head, heads
        if table is not None:
            table += head * rows
    ks = _rows(k + image * k0 + head * k1, at, inside, k2, D, BD)
    vs = _rows(v + image * v0 + head * v1, at, inside, v2, E, BE)
    q += image * q0 + head * q1
    dout += image * do0 + head * do1
    lse, delta = lse + (image * heads + head) * n, delta + (image * heads + head) * n
    dks, dvs = tl.zeros([N, BD], tl.float32), tl.zeros([N, BE], tl.float32)
    for it in range(steps):
        if EXTRA:
            token = begin + it * M + tl.arange(0, M)
            own, seen, row = token < end, inside[:, None], 0
        else:
            i, own, token = _box(plan, it, counts, first, last, origin, T)
            windows = _windows(plan, _across(i))
            seen, row = _pairs(plan, radius2, windows, _across(i), _down(j), inside[:, None], NDIM, BOUNDS)
        qs, dos = _rows(q, token, own, q2, D, BD), _rows(dout, token, own, do2, E, BE)
        top = tl.load(lse + token, mask=own, other=float("inf")) * _LOG2E
        logits = _biased(_dot(ks, tl.trans(qs)) * (scale * _LOG2E), table, seen, row)  # m n
        p = tl.exp2(logits - top[None, :])
        dvs += _dot(p.to(dos.dtype), dos)
        ds = p * (_dot(vs, tl.trans(dos)) - tl.load(delta + token, mask=own, other=0.0)[None, :])
        dks += _dot(ds.to(qs.dtype), qs)
    _put(dk + base * D, at, inside, stride * D, dks * scale, D, BD)
    _put(dv + base * E, at, inside, stride * E, dvs, E, BE)


@triton.jit
def _bias_kernel(
    dout, q, k, v, table, plan, lse, delta, dtable, n, heads, rows, scale, radius2, L1, L2, CHUNK,
    do0, do1, do2, q0, q1, q2, k0, k1, k2, v0, v1, v2,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Gradient of one bias of one head from one part of the queries of an image: each query meets one key."""
    row, head, part = _program(rows, heads)
    image, begin = part // tl.cdiv(n, CHUNK), part % tl.cdiv(n, CHUNK) * CHUNK
    r1, r2 = tl.load(plan + _REACH + 1), tl.load(plan + _REACH + 2)
    by2, by1 = row % (2 * r2 + 1) - r2, row // (2 * r2 + 1) % (2 * r1 + 1) - r1
    by0 = row // (2 * r2 + 1) // (2 * r1 + 1) - tl.load(plan + _REACH)
    bias = tl.load(table + head * rows + row)
    away = by0 * tl.load(plan + _STEPS) + by1 * tl.load(plan + _STEPS + 1) + by2 * tl.load(plan + _STEPS + 2)
    q += image * q0 + head * q1
    k += image * k0 + head * k1
    v += image * v0 + head * v1
    dout += image * do0 + head * do1
    acc, stat = tl.zeros([M], tl.float32), (image * heads + head) * n
    end = tl.minimum(begin + CHUNK, n)
    for it in range(begin, end, M):
        lane = it + tl.arange(0, M)
        own, lane = lane < end, tl.minimum(lane, n - 1)
        i0, i1, i2 = lane // L2 // L1, lane // L2 % L1, lane % L2
        windows, j = _windows(plan, (i0, i1, i2)), (i0 + by0, i1 + by1, i2 + by2)
        seen, _ = _pairs(plan, radius2, windows, (i0, i1, i2), j, own, 3, True)
        token = windows[0][3] + windows[1][3] + windows[2][3]
        ks, vs = _rows(k, token + away, seen, k2, D, BD), _rows(v, token + away, seen, v2, E, BE)
        qs, dos = _rows(q, token, seen, q2, D, BD), _rows(dout, token, seen, do2, E, BE)
        top = tl.load(lse + stat + token, mask=seen, other=float("inf"))
        p = tl.exp2((tl.sum(qs.to(tl.float32) * ks, 1) * scale + bias - top) * _LOG2E)
        acc += p * (tl.sum(dos.to(tl.float32) * vs, 1) - tl.load(delta + stat + token, mask=seen, other=0.0))
    tl.store(dtable + (part * heads + head) * rows + row, tl.sum(acc))


@torch.library.custom_op("zoo::neighborhood_attention_triton", mutates_args=())
def _neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    table: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    (b, heads, n, _), grid = q.shape, Geometry.unpack(geometry)
    out, lse = tokens_first(v), q.new_empty(b, heads, n, dtype=torch.float32)
    if lse.numel():
        q, k, v, extra_k, extra_v = (in_rows(t) for t in (q, k, v, extra_k, extra_v))
        launch = Launch("forward", grid, q, v, extra_k, table)
        _query_kernel[(launch.query_tiles * b * heads,)](
            None, q, k, v, extra_k, extra_v, table, launch.plan, out, lse, None, None, None, *launch.sizes,
            launch.query_tiles, scale, launch.radius2, *strides(None, q, k, v, extra_k, extra_v),
            **launch.constants, GRAD=False, **launch.options,
        )  # fmt: skip
    return out, lse


@_neighborhood_attention.register_fake
def _(q, k, v, extra_k, extra_v, table, geometry, scale):
    return tokens_first(v), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("zoo::neighborhood_attention_triton_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geometry: list[int],
    scale: float,
) -> list[Tensor]:
    (b, heads, n, _), grid = q.shape, Geometry.unpack(geometry)
    found = [tokens_first(t) for t in (q, k, v)]
    more = [t.new_zeros(t.shape) for t in (extra_k, extra_v, table) if t is not None]
    if not lse.numel():
        return found + more
    dout, q, k, v, extra_k, extra_v = (in_rows(t) for t in (dout, q, k, v, extra_k, extra_v))
    delta, dlse = torch.empty_like(lse), dlse.contiguous()
    launch = Launch("queries", grid, q, v, extra_k, table)
    _query_kernel[(launch.query_tiles * b * heads,)](
        dout, q, k, v, extra_k, extra_v, table, launch.plan, out, lse, dlse, delta, found[0], *launch.sizes,
        launch.query_tiles, scale, launch.radius2, *strides(dout, q, k, v, extra_k, extra_v),
        **launch.constants, GRAD=True, **launch.options,
    )  # fmt: skip
    launch = Launch("keys", grid, q, v, extra_k, table)
    _key_kernel[(launch.key_tiles * b * heads,)](
        dout, q, k, v, table, launch.plan, lse, delta, *found[1:], *launch.sizes, launch.key_tiles, scale,
        launch.radius2, _CHUNK, *strides(dout, q, k, v), **launch.constants, EXTRA=False, **launch.options,
    )  # fmt: skip
    parts = triton.cdiv(n, _CHUNK)
    if extra_k is not None and extra_k.numel():
        sums = [t.new_empty(parts, *t.shape, dtype=torch.float32) for t in (extra_k, extra_v)]
        blocks = triton.cdiv(extra_k.shape[2], launch.keys)
        _key_kernel[(blocks * b * heads, parts)](
            dout, q, extra_k, extra_v, None, launch.plan, lse, delta, *sums, *launch.sizes, blocks, scale, None, _CHUNK,
            *strides(dout, q, extra_k, extra_v), **launch.constants, EXTRA=True, **launch.options,
        )  # fmt: skip
        more[:2] = [part.sum(0).to(q.dtype) for part in sums]
    if table is not None:
        sums = table.new_empty(b * parts, *table.shape)
        _bias_kernel[(table.numel() * b * parts,)](
            dout, q, k, v, table, launch.plan, lse, delta, sums, n, heads, table.shape[1], scale, launch.radius2,
            *launch.lengths, _CHUNK, *strides(dout, q, k, v), **launch.widths, M=32,
        )  # fmt: skip
        more[-1] = sums.sum(0)
    return found + more


@_backward.register_fake
def _(dout, dlse, q, k, v, extra_k, extra_v, table, out, lse, geometry, scale):
    more = [t.new_empty(t.shape) for t in (extra_k, extra_v, table) if t is not None]
    return [tokens_first(t) for t in (q, k, v)] + more


def _save(ctx, inputs, output):
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx, dout, dlse):
    *inputs, out, lse = ctx.saved_tensors
    found = iter(_backward(dout, dlse, *inputs, out, lse, ctx.geometry, ctx.scale))
    return *(None if t is None else next(found) for t in inputs), None, None


_neighborhood_attention.register_autograd(_grad, setup_context=_save)


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
    table = None if bias is None else bias.flatten(1).float().contiguous()  # heads rows
    return _neighborhood_attention(q, k, v, extra_k, extra_v, table, geometry.pack(), scale)
