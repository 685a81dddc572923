"""One program takes a tile of queries (or of keys) of a head through several windows; their biases stay in registers.

Tokens are read from where they lie: a position in a window becomes a token by arithmetic (`_tokens`), so that nothing
is rolled, cut, padded or unfolded, and a mask is two small numbers compared. The backward computes the softmax anew
from its log-sum. Every gradient is a sum in a fixed order: windows that overlap leave parts in float32 that
`_sum_kernel` adds up, and the biases have a pass of their own where a window is larger than a tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from zoo.kernels.rounding import INTERPRETED, narrow

from .launches import Call

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # its bf16 products are wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")  # tf32 would cost float32 tokens three digits


@triton.jit
def _corner(number, rows, columns, shift_y, shift_x, dilation_y, dilation_x, WH: tl.constexpr, WW: tl.constexpr):
    """Image, row and column of the first query of a window; the rows are those before the roll."""
    row, column = number // columns % rows, number % columns
    y = row // dilation_y * (WH * dilation_y) + row % dilation_y + shift_y
    x = column // dilation_x * (WW * dilation_x) + column % dilation_x + shift_x
    return (number // (rows * columns)).to(tl.int64), y, x


@triton.jit
def _reach(i, dilation_y, dilation_x, WH: tl.constexpr, WW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr):
    """How far positions `i` of a window lie from its first query, and which of them it has."""
    WIDE: tl.constexpr = WW + 2 * OW
    return (i // WIDE - OH) * dilation_y, (i % WIDE - OW) * dilation_x, i < (WH + 2 * OH) * WIDE


@triton.jit
def _tokens(y, x, held, order_ptr, axes, SHIFTED: tl.constexpr, WRAP: tl.constexpr, ATTEND: tl.constexpr):
    """Tokens at places (y, x), which of them the map has, and marks: a query sees the keys of its own; -1 is hidden."""
    h, w, size_y, size_x, order_n = axes
    mark = tl.zeros_like(y)
    if SHIFTED:
        below, beyond = y >= size_y, x >= size_x
        y, x = tl.where(below, y - size_y, y), tl.where(beyond, x - size_x, x)
        if not WRAP:
            mark = 2 * below.to(tl.int32) + beyond.to(tl.int32)  # the borders that they came around
    real = held & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    token = (y * w + x).to(tl.int64)
    if order_ptr is not None:
        token = tl.load(order_ptr + token * order_n, mask=real, other=0)
    return token, real, tl.where(held if ATTEND else real, mark, -1)


@triton.jit
def _load(ptr, token, held, along_n, along_d, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = token[:, None] * along_n + column[None, :].to(tl.int64) * along_d
    return tl.load(ptr + at, mask=held[:, None] & (column[None, :] < D), other=0.0)


@triton.jit
def _store(ptr, token, held, along_n, values, D: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = token[:, None] * along_n + column[None, :]
    tl.store(ptr + at, narrow(values, ptr.dtype.element_ty), mask=held[:, None] & (column[None, :] < D))


@triton.jit
def _biases(ptr, query, key, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """As exponents of two; `query` and `key` broadcast against each other."""
    return tl.load(ptr + query * KEYS + key, mask=(query < QUERIES) & (key < KEYS), other=0.0) * _LOG2E


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, order_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, order_b, order_h, order_n,
    scale, windows, rows, columns, h, w, size_y, size_x, shift_y, shift_x, dilation_y, dilation_x, heads, share,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    SHIFTED: tl.constexpr, WRAP: tl.constexpr, ATTEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = WH * WW
    KEYS: tl.constexpr = (WH + 2 * OH) * (WW + 2 * OW)
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0) // TILES * share
    axes = h, w, size_y, size_x, order_n
    query, key = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    down, right, whole = _reach(query, dilation_y, dilation_x, WH, WW, 0, 0)
    key_down, key_right, held = _reach(key, dilation_y, dilation_x, WH, WW, OH, OW)
    if bias_ptr is not None:
        bias_ptr += head * QUERIES * KEYS
        bias = _biases(
            bias_ptr, query[:, None], key[None, :], QUERIES, KEYS
        )  # of all windows, where one tile is enough
    for number in range(first, min(first + share, windows)):
        image, y, x = _corner(number, rows, columns, shift_y, shift_x, dilation_y, dilation_x, WH, WW)
        orders = order_ptr
        if order_ptr is not None:
            orders += image * order_b + head * order_h
        token, real, own = _tokens(y + down, x + right, whole, orders, axes, SHIFTED, WRAP, True)
        q = _load(q_ptr + image * q_b + head * q_h, token, real, q_n, q_d, D, BLOCK_D)
        most = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
        for start in range(0, KEYS, BLOCK_N):
            if KEYS > BLOCK_N:
                key = start + tl.arange(0, BLOCK_N)
                key_down, key_right, held = _reach(key, dilation_y, dilation_x, WH, WW, OH, OW)
                if bias_ptr is not None:
                    bias = _biases(bias_ptr, query[:, None], key[None, :], QUERIES, KEYS)
            other, inside, mark = _tokens(y + key_down, x + key_right, held, orders, axes, SHIFTED, WRAP, ATTEND)
            k = _load(k_ptr + image * k_b + head * k_h, other, inside, k_n, k_d, D, BLOCK_D)
            logits = _dot(q, k.T) * (scale * _LOG2E)
            if bias_ptr is not None:
                logits += bias
            logits = tl.where(own[:, None] == mark[None, :], logits, -float("inf"))
            top = tl.maximum(most, tl.max(logits, 1))
            level = tl.where(top == -float("inf"), 0.0, top)  # a padded query may see nothing
            p, shrink = tl.exp2(logits - level[:, None]), tl.exp2(most - level)
            v = _load(v_ptr + image * v_b + head * v_h, other, inside, v_n, v_d, E, BLOCK_E)
            total = total * shrink + tl.sum(p, 1)
            sums = sums * shrink[:, None] + _dot(narrow(p, v.dtype), v)
            most = top
        total = tl.where(real, total, 1.0)
        line = (image * h * w) * heads + head  # of (b n heads)
        _store(out_ptr + line * E, token, real, heads * E, sums / total[:, None], E, BLOCK_E)
        tl.store(lse_ptr + line + token * heads, most + tl.log2(total), mask=real)


@triton.jit
def _dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, bias_ptr, order_ptr, delta_ptr, dq_ptr,
    do_b, do_h, do_n, do_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, order_b, order_h, order_n,
    scale, windows, rows, columns, h, w, size_y, size_x, shift_y, shift_x, dilation_y, dilation_x, heads, share,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    SHIFTED: tl.constexpr, WRAP: tl.constexpr, ATTEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    QUERIES: tl.constexpr = WH * WW
    KEYS: tl.constexpr = (WH + 2 * OH) * (WW + 2 * OW)
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M
    head, first = tl.program_id(1).to(tl.int64), tl.program_id(0) // TILES * share
    axes = h, w, size_y, size_x, order_n
    query = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    down, right, whole = _reach(query, dilation_y, dilation_x, WH, WW, 0, 0)
    for number in range(first, min(first + share, windows)):
        image, y, x = _corner(number, rows, columns, shift_y, shift_x, dilation_y, dilation_x, WH, WW)
        orders = order_ptr
        if order_ptr is not None:
            orders += image * order_b + head * order_h
        token, real, own = _tokens(y + down, x + right, whole, orders, axes, SHIFTED, WRAP, True)
        line = (image * h * w) * heads + head  # of (b n heads)
        q = _load(q_ptr + image * q_b + head * q_h, token, real, q_n, q_d, D, BLOCK_D)
        dout = _load(dout_ptr + image * do_b + head * do_h, token, real, do_n, do_d, E, BLOCK_E)
        out = _load(out_ptr + line * E, token, real, heads * E, 1, E, BLOCK_E)
        lse = tl.load(lse_ptr + line + token * heads, mask=real, other=float("inf"))
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(delta_ptr + line + token * heads, delta, mask=real)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for start in range(0, KEYS, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            key_down, key_right, held = _reach(key, dilation_y, dilation_x, WH, WW, OH, OW)
            other, inside, mark = _tokens(y + key_down, x + key_right, held, orders, axes, SHIFTED, WRAP, ATTEND)
            k = _load(k_ptr + image * k_b + head * k_h, other, inside, k_n, k_d, D, BLOCK_D)
            v = _load(v_ptr + image * v_b + head * v_h, other, inside, v_n, v_d, E, BLOCK_E)
            logits = _dot(q, k.T) * (scale * _LOG2E)
            if bias_ptr is not None:
                logits += _biases(bias_ptr + head * QUERIES * KEYS, query[:, None], key[None, :], QUERIES, KEYS)
            p = tl.where(own[:, None] == mark[None, :], tl.exp2(logits - lse[:, None]), 0.0)
            ds = p * (_dot(dout, v.T) - delta[:, None])
            dq += _dot(narrow(ds, k.dtype), k)
        _store(dq_ptr + line * D, token, real, heads * D, dq * scale, D, BLOCK_D)


@triton.jit
def _dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, bias_ptr, order_ptr, delta_ptr, dk_ptr, dv_ptr, dbias_ptr,
    do_b, do_h, do_n, do_d, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, order_b, order_h, order_n,
    scale, windows, rows, columns, h, w, size_y, size_x, shift_y, shift_x, dilation_y, dilation_x, heads, share,
    D: tl.constexpr, E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    SHIFTED: tl.constexpr, WRAP: tl.constexpr, ATTEND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS_TOO: tl.constexpr, BIAS_TOO: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, summed over all query tiles, or of the biases of one query tile, or both."""
    QUERIES: tl.constexpr = WH * WW
    KEYS: tl.constexpr = (WH + 2 * OH) * (WW + 2 * OW)
    TILES: tl.constexpr = (QUERIES + BLOCK_M - 1) // BLOCK_M if BIAS_TOO else 1
    KEY_TILES: tl.constexpr = (KEYS + BLOCK_N - 1) // BLOCK_N
    head, group = tl.program_id(1).to(tl.int64), tl.program_id(0) // (TILES * KEY_TILES)
    axes = h, w, size_y, size_x, order_n
    begin = tl.program_id(0) % TILES * BLOCK_M
    key = tl.program_id(0) // TILES % KEY_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    key_down, key_right, held = _reach(key, dilation_y, dilation_x, WH, WW, OH, OW)
    if BIAS_TOO:
        dbias = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for number in range(group * share, min((group + 1) * share, windows)):
        image, y, x = _corner(number, rows, columns, shift_y, shift_x, dilation_y, dilation_x, WH, WW)
        orders = order_ptr
        if order_ptr is not None:
            orders += image * order_b + head * order_h
        other, inside, mark = _tokens(y + key_down, x + key_right, held, orders, axes, SHIFTED, WRAP, ATTEND)
        k = _load(k_ptr + image * k_b + head * k_h, other, inside, k_n, k_d, D, BLOCK_D)
        v = _load(v_ptr + image * v_b + head * v_h, other, inside, v_n, v_d, E, BLOCK_E)
        line = (image * h * w) * heads + head  # of (b n heads)
        if KEYS_TOO:
            dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
        for start in range(begin, begin + BLOCK_M if BIAS_TOO else QUERIES, BLOCK_M):
            query = start + tl.arange(0, BLOCK_M)
            down, right, whole = _reach(query, dilation_y, dilation_x, WH, WW, 0, 0)
            token, real, own = _tokens(y + down, x + right, whole, orders, axes, SHIFTED, WRAP, True)
            q = _load(q_ptr + image * q_b + head * q_h, token, real, q_n, q_d, D, BLOCK_D)
            dout = _load(dout_ptr + image * do_b + head * do_h, token, real, do_n, do_d, E, BLOCK_E)
            lse = tl.load(lse_ptr + line + token * heads, mask=real, other=float("inf"))
            delta = tl.load(delta_ptr + line + token * heads, mask=real, other=0.0)
            logits = _dot(k, q.T) * (scale * _LOG2E)
            if bias_ptr is not None:
                logits += _biases(bias_ptr + head * QUERIES * KEYS, query[None, :], key[:, None], QUERIES, KEYS)
            p = tl.where(own[None, :] == mark[:, None], tl.exp2(logits - lse[None, :]), 0.0)
            ds = p * (_dot(v, dout.T) - delta[None, :])
            if KEYS_TOO:
                dv += _dot(narrow(p, dout.dtype), dout)
                dk += _dot(narrow(ds, q.dtype), q)
            if BIAS_TOO:
                dbias += ds
        if KEYS_TOO:
            row, apart = other, heads
            if OH + OW > 0:  # parts: (b windows, heads, keys, d)
                row, apart, line = key.to(tl.int64), 1, (head + number * heads) * KEYS
            _store(dk_ptr + line * D, row, inside, apart * D, dk * scale, D, BLOCK_D)
            _store(dv_ptr + line * E, row, inside, apart * E, dv, E, BLOCK_E)
    if BIAS_TOO:  # (groups, heads, queries, keys)
        query = begin + tl.arange(0, BLOCK_M)
        at = (head + group * heads) * QUERIES * KEYS + query[None, :] * KEYS + key[:, None]
        tl.store(dbias_ptr + at, dbias, mask=(query[None, :] < QUERIES) & (key[:, None] < KEYS))


@triton.jit
def _sum_kernel(
    parts_ptr, out_ptr, order_ptr, order_b, order_h, order_n,
    windows, rows, columns, h, w, size_y, size_x, shift_y, shift_x, dilation_y, dilation_x, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up what the windows that overlap at a token have for it; such windows neither shift nor spread."""
    FAR_Y: tl.constexpr = (OH + WH - 1) // WH
    FAR_X: tl.constexpr = (OW + WW - 1) // WW
    n, head = h * w, tl.program_id(1).to(tl.int64)
    image, block = (tl.program_id(0) // tl.cdiv(n, BLOCK_N)).to(tl.int64), tl.program_id(0) % tl.cdiv(n, BLOCK_N)
    place = block * BLOCK_N + tl.arange(0, BLOCK_N)
    y, x = place // w, place % w
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for down in range(-FAR_Y, FAR_Y + 1):
        for right in range(-FAR_X, FAR_X + 1):
            row, column = y // WH + down, x // WW + right
            i, j = y + OH - row * WH, x + OW - column * WW
            held = (row >= 0) & (row < rows) & (i >= 0) & (i < WH + 2 * OH) & (place < n)
            held &= (column >= 0) & (column < columns) & (j >= 0) & (j < WW + 2 * OW)
            window = image * rows * columns + row * columns + column
            key = ((window * heads + head) * (WH + 2 * OH) + i) * (WW + 2 * OW) + j
            total += _load(parts_ptr, key, held, D, 1, D, BLOCK_D)
    token = place.to(tl.int64)
    if order_ptr is not None:
        token = tl.load(order_ptr + image * order_b + head * order_h + token * order_n, mask=place < n, other=0)
    _store(out_ptr + (image * n * heads + head) * D, token, place < n, heads * D, total, D, BLOCK_D)


@torch.library.custom_op("zoo::window_attention_triton", mutates_args=())
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    geometry: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    call = Call(q, v, order, geometry)
    out, lse = _like(v), _like(q[..., 0], torch.float32)
    if out.numel():
        programs, options = call.launch(call.tiles[0])
        strides = (*q.stride(), *k.stride(), *v.stride(), *call.order)
        _forward_kernel[programs](q, k, v, out, lse, bias, order, *strides, scale, *call.where, **options)
    return out, lse


@_window_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _like(v), _like(q[..., 0], torch.float32)


@torch.library.custom_op("zoo::window_attention_triton_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    order: Tensor | None,
    out: Tensor,
    lse: Tensor,
    geometry: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(q, v, order, geometry)
    dq, dk, dv, delta = _like(q), _like(k), _like(v), _like(lse)
    if not dout.numel():
        return dq.zero_(), dk.zero_(), dv, q.new_empty(0) if bias is None else torch.zeros_like(bias)
    out, lse = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (out, lse))  # in memory b n heads ...
    strides = (*dout.stride(), *q.stride(), *k.stride(), *v.stride(), *call.order)
    programs, options = call.launch(call.tiles[1])
    _dq_kernel[programs](dout, q, k, v, out, lse, bias, order, delta, dq, *strides, scale, *call.where, **options)

    parts, dbias = [dk, dv], q.new_empty(0)
    if call.keys > call.queries:
        parts = [q.new_empty(call.windows * call.heads * call.keys, t.shape[3], dtype=torch.float32) for t in (k, v)]
    once = bias is None or call.small
    for keys_too, bias_too in [(True, bias is not None)] if once else [(True, False), (False, True)]:
        programs, options = call.launch(call.tiles[2 + bias_too], queries=bias_too, keys=True)
        if bias is not None and bias_too:
            dbias = bias.new_empty(triton.cdiv(call.windows, options["share"]), *bias.shape)
        _dkv_kernel[programs](
            dout, q, k, v, lse, bias, order, delta, *parts, dbias, *strides, scale, *call.where, **options,
            KEYS_TOO=keys_too, BIAS_TOO=bias_too,
        )  # fmt: skip
    if call.keys > call.queries:
        programs = (call.b * triton.cdiv(call.n, 64), call.heads)
        for part, total, width in zip(parts, (dk, dv), ("D", "E"), strict=True):
            sizes = {"D": call.widths[width], "BLOCK_D": call.widths["BLOCK_" + width], "BLOCK_N": 64} | call.window
            _sum_kernel[programs](part, total, order, *call.order, *call.where, **sizes, num_warps=4)
    return dq, dk, dv, dbias if bias is None else dbias.sum(0)


@_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: object) -> tuple[Tensor, ...]:
    return _like(q), _like(k), _like(v), q.new_empty(0) if bias is None else torch.empty_like(bias)


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for `x`, (b, heads, n, ...), that lies as b n heads ..."""
    return x.new_empty(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _grad(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    *grads, dbias = _backward(dout, *ctx.saved_tensors, ctx.geometry, ctx.scale)
    return *grads, None if ctx.saved_tensors[3] is None else dbias, None, None, None


_window_attention.register_autograd(_grad, setup_context=_save)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    dilation: tuple[int, int],
    shift: tuple[int, int],
    overlap: tuple[int, int],
    wrap: bool,
    order: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    pad: str,
    scale: float,
) -> Tensor:
    bias = None
    if bias_table is not None and bias_index is not None:
        # The backward of an embedding adds in a fixed order.
        bias = F.embedding(bias_index % len(bias_table), bias_table.float()).permute(2, 0, 1).contiguous()  # heads n m
    geometry = (*grid, *window, *dilation, *shift, *overlap, int(wrap), int(pad == "attend"))
    return _window_attention(q, k, v, bias, order, geometry, scale)[0]
