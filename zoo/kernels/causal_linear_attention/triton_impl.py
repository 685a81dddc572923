"""Three kernels forward: sums over chunks, their running total, and the output of each chunk; the same backward.

A tile of C rows is a chunk: blocks of `block` tokens, each padded to M rows, a power of two. Pairs inside of it are
decayed as in the other fast implementation: quarter by quarter, from the middle to the query and from the key to the
middle, never dividing. Blocks longer than a tile are chunks of their own, whose queries read the state after them.

States are float32, one for each chunk; the backward makes them anew. No atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.chips import INTERPRETED

from .decay import by_block

_INTERPRETED = tl.constexpr(INTERPRETED)  # the interpreter cuts digits off where a GPU rounds to bf16
# Half-precision tokens are exact as tf32, and states and weights keep more digits than in bf16, and more range than in
# float16. For float32 tf32 would be too coarse.
_PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}
_TILE = 4096  # numbers: tiles of tokens, and of states, that fit into registers several at a time


@triton.jit
def _rounded(x):
    """To the nearest tf32: tensor cores cut the digits off, which shrinks every product."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "tf32":
        a, b = _rounded(a), _rounded(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _load(ptr, rows, along_rows, columns, along_columns, inside):
    places = rows[:, None].to(tl.int64) * along_rows + columns[None, :] * along_columns
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, x, rows, along_rows, columns, along_columns, inside):
    if _INTERPRETED and ptr.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    places = rows[:, None].to(tl.int64) * along_rows + columns[None, :] * along_columns
    tl.store(ptr + places, x.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tokens(row, first, stop, block, C: tl.constexpr, M: tl.constexpr):
    """Token of each row of a tile, and whether there is one."""
    token = first + row // M * block + row % M
    return token, (row < C) & (row % M < block) & (token < stop)


@triton.jit
def _gates(g_ptr, gn, gd, first, stop, block, width, C: tl.constexpr, M: tl.constexpr, G: tl.constexpr):
    """Logarithms of the decay at each row, and at the row after it, (C, G)."""
    row, column = tl.arange(0, C), tl.arange(0, G)
    token, there = _tokens(row, first, stop, block, C, M)
    g = _load(g_ptr, token, gn, column, gd, there[:, None] & (column < width)[None, :])
    token, there = _tokens(row + 1, first, stop, block, C, M)
    return g, _load(g_ptr, token, gn, column, gd, there[:, None] & (column < width)[None, :])


@triton.jit
def _up_to(x, SIZE: tl.constexpr, C: tl.constexpr, G: tl.constexpr, BACK: tl.constexpr):
    """Sums up to each row, or from it on (BACK), in pieces of SIZE rows."""
    if SIZE > 1:
        x = tl.reshape(tl.cumsum(tl.reshape(x, (C // SIZE, SIZE, G)), 1, reverse=BACK), (C, G))
    return x


@triton.jit
def _decays(g, after, SIZE: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
    """In pieces of SIZE rows: from before a piece to the row, and from the row to the end of the piece."""
    inner = ((tl.arange(0, C) + 1) % SIZE != 0)[:, None]
    to_query = tl.exp(_up_to(g, SIZE, C, G, False))
    return to_query, tl.exp(_up_to(tl.where(inner, after, 0.0), SIZE, C, G, True))


@triton.jit
def _quarter(SIZE: tl.constexpr, C: tl.constexpr):
    """Queries in second halves, keys in the first ones of the same 2 SIZE rows."""
    i, j = tl.arange(0, C)[:, None] // SIZE, tl.arange(0, C)[None, :] // SIZE
    return (i == j + 1) & (j % 2 == 0)


@triton.jit
def _pairs(q, k, g, after, G: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr, M: tl.constexpr, P: tl.constexpr):
    """Weights of values inside of a tile; (C, C)."""
    i, j = tl.arange(0, C)[:, None] // M, tl.arange(0, C)[None, :] // M
    products = _dot(q, tl.trans(k), tl.zeros((C, C), tl.float32), P)
    if G == 0:
        pairs = tl.where(i >= j, products, 0.0)
    else:
        pairs = tl.where(i == j, products, 0.0)
        for level in tl.static_range(LEVELS):
            to_query, from_key = _decays(g, after, M << level, C, G)
            if G == 1:
                part = products * (to_query * tl.trans(from_key))
            else:
                part = _dot(q * to_query, tl.trans(k * from_key), tl.zeros((C, C), tl.float32), P)
            pairs += tl.where(_quarter(M << level, C), part, 0.0)
    return pairs


@triton.jit
def _sum_kernel(
    x_ptr, g_ptr, y_ptr, sums_ptr, whole_ptr,
    xb, xh, xn, xd, gb, gh, gn, gd, yb, yh, yn, ye,
    heads, n, d, e, chunks, span, block, slot,
    KEYS: tl.constexpr, OWN: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Sum x y^T over each chunk, x decayed from keys to its end (KEYS), or from before it to queries."""
    chunk, bh = tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64)
    b, h = bh // heads, bh % heads
    ds, es, row = tl.arange(0, D), tl.program_id(1) * E + tl.arange(0, E), tl.arange(0, C)
    stop = tl.minimum(chunk * span + span, n)
    sums = tl.zeros((D, E), tl.float32)
    for first in range(chunk * span, stop, C if OWN else span):
        token, there = _tokens(row, first, stop, block, C, M)
        x = _load(x_ptr + b * xb + h * xh, token, xn, ds, xd, there[:, None] & (ds < d)[None, :])
        y = _load(y_ptr + b * yb + h * yh, token, yn, es, ye, there[:, None] & (es < e)[None, :])
        if G > 0 and not OWN:
            width = 1 if G == 1 else d
            g, after = _gates(g_ptr + b * gb + h * gh, gn, gd, first, stop, block, width, C, M, G)
            to_query, from_key = _decays(g, after, C, C, G)
            x *= from_key if KEYS else to_query
        sums = _dot(tl.trans(x), y, sums, PRECISION)
    if G > 0 and KEYS:
        # The decay of a block lies at its first token, so that the first tile holds all of it.
        column, width = tl.arange(0, G), 1 if G == 1 else d
        g, after = _gates(g_ptr + b * gb + h * gh, gn, gd, chunk * span, stop, block, width, C, M, G)
        whole = tl.exp(tl.sum(g, 0))
        tl.store(whole_ptr + (bh * chunks + chunk) * width + column, whole, mask=column < width)
    sums_ptr += (bh * (chunks + 1) + chunk + slot) * d * e
    _store(sums_ptr, sums, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])


@triton.jit
def _carry_kernel(
    sums_ptr, whole_ptr, chunks, d, e, BACK: tl.constexpr, OWN: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr
):
    """Turn sums over chunks into states, one before each chunk and the last; BACK into their gradients."""
    bh, place = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, width = place < d * e, 1 if G == 1 else d
    length, base = d * e, bh * (chunks + 1)
    state = tl.load(sums_ptr + (base + (chunks if BACK else 0)) * length + place, mask=inside, other=0.0)
    if BACK and OWN:
        state = tl.zeros((BLOCK,), tl.float32)
    for i in range(chunks):
        chunk = chunks - 1 - i if BACK else i
        before, after = sums_ptr + (base + chunk) * length + place, sums_ptr + (base + chunk + 1) * length + place
        decay = 1.0
        if G > 0:
            channel = place * 0 if G == 1 else place // e
            decay = tl.load(whole_ptr + (bh * chunks + chunk) * width + channel, mask=inside, other=0.0)
        if not BACK:
            state = decay * state + tl.load(after, mask=inside, other=0.0)
            tl.store(after, state, mask=inside)
        elif OWN:
            state += tl.load(after, mask=inside, other=0.0)
            tl.store(after, state, mask=inside)
            state *= decay
        else:
            read = tl.load(before, mask=inside, other=0.0)
            tl.store(after, state, mask=inside)
            state = decay * state + read
    if BACK:
        tl.store(sums_ptr + base * length + place, state, mask=inside)


@triton.jit
def _output_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, states_ptr, o_ptr,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, ve, gb, gh, gn, gd, ob, oh, on, oe,
    heads, n, d, e, chunks, tiles, span, block,
    OWN: tl.constexpr, G: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0) % (chunks * tiles), (tl.program_id(0) // (chunks * tiles)).to(tl.int64)
    b, h, chunk = bh // heads, bh % heads, tile // tiles
    first, stop = chunk * span + tile % tiles * C, tl.minimum(chunk * span + span, n)
    ds, es = tl.arange(0, D), tl.program_id(1) * E + tl.arange(0, E)
    token, there = _tokens(tl.arange(0, C), first, stop, block, C, M)
    of_d, of_e = there[:, None] & (ds < d)[None, :], there[:, None] & (es < e)[None, :]
    q = _load(q_ptr + b * qb + h * qh, token, qn, ds, qd, of_d)
    states_ptr += (bh * (chunks + 1) + chunk + (1 if OWN else 0)) * d * e
    state = _load(states_ptr, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])
    o = tl.zeros((C, E), tl.float32)
    if OWN:
        o = _dot(q, state, o, PRECISION)
    else:
        k = _load(k_ptr + b * kb + h * kh, token, kn, ds, kd, of_d)
        v = _load(v_ptr + b * vb + h * vh, token, vn, es, ve, of_e)
        g, after, to_query = 0.0, 0.0, 1.0
        if G > 0:
            width = 1 if G == 1 else d
            g, after = _gates(g_ptr + b * gb + h * gh, gn, gd, first, stop, block, width, C, M, G)
            to_query = tl.exp(_up_to(g, C, C, G, False))
        o = _dot(q * to_query, state, o, PRECISION)
        o = _dot(_pairs(q, k, g, after, G, LEVELS, C, M, PRECISION), v, o, PRECISION)
    _store(o_ptr + b * ob + h * oh, o, token, on, es, oe, of_e)


@triton.jit
def _gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, states_ptr, dstates_ptr, dq_ptr, dk_ptr, dv_ptr, dg_ptr,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, ve, gb, gh, gn, gd, ob, oh, on, oe,
    heads, n, d, e, chunks, tiles, span, block,
    OWN: tl.constexpr, G: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.program_id(0) % (chunks * tiles), (tl.program_id(0) // (chunks * tiles)).to(tl.int64)
    b, h, chunk = bh // heads, bh % heads, tile // tiles
    first, stop = chunk * span + tile % tiles * C, tl.minimum(chunk * span + span, n)
    ds = tl.arange(0, D)
    token, there = _tokens(tl.arange(0, C), first, stop, block, C, M)
    of_d = there[:, None] & (ds < d)[None, :]
    q = _load(q_ptr + b * qb + h * qh, token, qn, ds, qd, of_d)
    k = _load(k_ptr + b * kb + h * kh, token, kn, ds, kd, of_d)
    dstates_ptr += (bh * (chunks + 1) + chunk + 1) * d * e  # of the state after this chunk
    states_ptr += (bh * (chunks + 1) + chunk + (1 if OWN else 0)) * d * e  # the one that queries read
    g, after, to_query, from_key = 0.0, 0.0, 1.0, 1.0
    width = 1 if G == 1 else d
    if G > 0 and not OWN:
        g, after = _gates(g_ptr + b * gb + h * gh, gn, gd, first, stop, block, width, C, M, G)
        to_query, from_key = _decays(g, after, C, C, G)
    if not OWN:
        pairs = _pairs(q, k, g, after, G, LEVELS, C, M, PRECISION)
        dpairs = tl.zeros((C, C), tl.float32)
    dq, dk, dwhole = tl.zeros((C, D), tl.float32), tl.zeros((C, D), tl.float32), tl.zeros((D,), tl.float32)
    for start in range(0, e, E):
        es = start + tl.arange(0, E)
        of_e, of_state = there[:, None] & (es < e)[None, :], (ds < d)[:, None] & (es < e)[None, :]
        do = _load(do_ptr + b * ob + h * oh, token, on, es, oe, of_e)
        v = _load(v_ptr + b * vb + h * vh, token, vn, es, ve, of_e)
        state, dstate = _load(states_ptr, ds, e, es, 1, of_state), _load(dstates_ptr, ds, e, es, 1, of_state)
        dq = _dot(do, tl.trans(state), dq, PRECISION)
        dk = _dot(v, tl.trans(dstate), dk, PRECISION)
        dwhole += tl.sum(state * dstate, 1)
        dv = _dot(k * from_key, dstate, tl.zeros((C, E), tl.float32), PRECISION)
        if not OWN:
            dv = _dot(tl.trans(pairs), do, dv, PRECISION)
            dpairs = _dot(do, tl.trans(v), dpairs, PRECISION)
        _store(dv_ptr + (b * n * heads + h) * e, dv, token, heads * e, es, 1, of_e)
    dq *= to_query
    dk *= from_key
    if not OWN:
        i, j = tl.arange(0, C)[:, None] // M, tl.arange(0, C)[None, :] // M
        dproducts = tl.where(i >= j, dpairs, 0.0)
        if G > 0:
            dproducts = tl.where(i == j, dpairs, 0.0)
            of_queries, of_keys, of_whole = q * dq, k * dk, tl.exp(tl.sum(g, 0)) * dwhole
            if G == 1:
                of_queries, of_keys = tl.sum(of_queries, 1)[:, None], tl.sum(of_keys, 1)[:, None]
                of_whole = tl.zeros((1,), tl.float32) + tl.sum(of_whole, 0)
            dg = _up_to(of_queries, C, C, G, True) + _up_to(of_keys, C, C, G, False) - of_keys + of_whole[None, :]
            for level in tl.static_range(LEVELS):
                to_query, from_key = _decays(g, after, M << level, C, G)
                dquarter = tl.where(_quarter(M << level, C), dpairs, 0.0)
                if G == 1:
                    dproducts += dquarter * (to_query * tl.trans(from_key))
                    of_queries, of_keys = tl.sum(dquarter * pairs, 1)[:, None], tl.sum(dquarter * pairs, 0)[:, None]
                else:
                    dqs = to_query * _dot(dquarter, k * from_key, tl.zeros((C, D), tl.float32), PRECISION)
                    dks = from_key * _dot(tl.trans(dquarter), q * to_query, tl.zeros((C, D), tl.float32), PRECISION)
                    dq += dqs
                    dk += dks
                    of_queries, of_keys = q * dqs, k * dks
                dg += _up_to(of_queries, M << level, C, G, True)
                dg += _up_to(of_keys, M << level, C, G, False) - of_keys
            columns = tl.arange(0, G)
            of_g = there[:, None] & (columns < width)[None, :]
            _store(dg_ptr + bh * n * width, dg, token, width, columns, 1, of_g)
        dq = _dot(dproducts, k, dq, PRECISION)
        dk = _dot(tl.trans(dproducts), q, dk, PRECISION)
    _store(dq_ptr + (b * n * heads + h) * d, dq, token, heads * d, ds, 1, of_d)
    _store(dk_ptr + (b * n * heads + h) * d, dk, token, heads * d, ds, 1, of_d)


class _Plan(NamedTuple):
    chunks: int
    tiles: int  # of a chunk
    span: int  # tokens of a chunk
    block: int  # tokens of a block inside of a tile
    grid: tuple[int, int]  # programs by tiles of tokens and of values
    shape: dict[str, object]


def _plan(q: Tensor, v: Tensor, g: Tensor | None, block: int) -> _Plan:
    (b, heads, n, d), e = q.shape, v.shape[3]
    wide = max(16, triton.next_power_of_2(d))
    rows = min(64, max(16, _TILE // wide))
    values = min(rows, max(16, triton.next_power_of_2(e)))
    own = block > rows
    padded = rows if own else triton.next_power_of_2(block)
    span = block if own else rows // padded * block
    tiles, chunks = triton.cdiv(block, rows) if own else 1, triton.cdiv(n, span)
    shape = {"OWN": own, "G": 0 if g is None else 1 if g.shape[3] == 1 else wide, "PRECISION": _PRECISION[v.dtype]}
    shape |= {"C": rows, "M": padded, "D": wide, "E": values, "num_warps": 8, "num_stages": 1}
    grid = (chunks * b * heads, triton.cdiv(e, values))
    return _Plan(chunks, tiles, span, rows if own else block, grid, shape)


def _sums(
    x: Tensor, g: Tensor | None, y: Tensor, edge: Tensor, whole: Tensor | None, plan: _Plan, keys: bool
) -> tuple[Tensor, Tensor | None]:
    """States before each chunk and the last, (b, heads, chunks + 1, d, e), and the decay over chunks.

    Or, for queries and gradients of the output, the gradients of these states.
    """
    (b, heads, n, d), e, own = x.shape, y.shape[3], plan.shape["OWN"]
    sums, last = x.new_empty(b, heads, plan.chunks + 1, d, e, dtype=torch.float32), plan.chunks
    if keys and g is not None:
        whole = sums.new_empty(b, heads, plan.chunks, g.shape[3])
    sums[:, :, 0 if keys else last] = edge
    gates = x if g is None else g
    _sum_kernel[plan.grid](
        x, gates, y, sums, whole, *x.stride(), *gates.stride(), *y.stride(),
        heads, n, d, e, plan.chunks, plan.span, plan.block, int(keys or own), KEYS=keys, **plan.shape,
    )  # fmt: skip
    if not keys and own:  # the last chunk reads the last state
        sums[:, :, last] += edge
    _carry_kernel[b * heads, triton.cdiv(d * e, 512)](
        sums, whole, plan.chunks, d, e, BACK=not keys, OWN=own, G=plan.shape["G"], BLOCK=512
    )
    return sums, whole


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads next to the features, as the projections around the attention want them."""
    return x.new_empty(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def _levels(plan: _Plan) -> int:
    return (plan.shape["C"] // plan.shape["M"]).bit_length() - 1


@torch.library.custom_op("zoo::causal_linear_attention", mutates_args=())
def _causal(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = _empty(v, dtype)
    if not out.numel():
        return out, initial_state.float().clone()
    plan, gates = _plan(q, v, g, block), q if g is None else g
    states, _ = _sums(k, g, v, initial_state, None, plan, keys=True)
    _output_kernel[plan.grid[0] * plan.tiles, plan.grid[1]](
        q, k, v, gates, states, out, *q.stride(), *k.stride(), *v.stride(), *gates.stride(), *out.stride(),
        q.shape[1], q.shape[2], q.shape[3], v.shape[3], plan.chunks, plan.tiles, plan.span, plan.block,
        LEVELS=_levels(plan), **plan.shape,
    )  # fmt: skip
    return out, states[:, :, -1].clone()


@_causal.register_fake
def _(q, k, v, g, initial_state, block, dtype):
    return _empty(v, dtype), torch.empty_like(initial_state, dtype=torch.float32)


@torch.library.custom_op("zoo::causal_linear_attention_backward", mutates_args=())
def _causal_backward(
    dout: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty(t, t.dtype) for t in (q, k, v))
    dg = q.new_empty(0) if g is None else g.new_zeros(g.shape)
    if not dv.numel():
        return dq, dk, dv, dg, dstate.to(initial_state.dtype, copy=True)
    plan, gates = _plan(q, v, g, block), q if g is None else g
    states, whole = _sums(k, g, v, initial_state, None, plan, keys=True)
    dstates, _ = _sums(q, g, dout, dstate, whole, plan, keys=False)
    _gradient_kernel[(plan.grid[0] * plan.tiles,)](
        q, k, v, gates, dout, states, dstates, dq, dk, dv, dg,
        *q.stride(), *k.stride(), *v.stride(), *gates.stride(), *dout.stride(),
        q.shape[1], q.shape[2], q.shape[3], v.shape[3], plan.chunks, plan.tiles, plan.span, plan.block,
        LEVELS=_levels(plan), **plan.shape,
    )  # fmt: skip
    if g is not None and plan.shape["OWN"]:  # the decay of a block lies at its first token
        dwhole = whole * (states[:, :, :-1] * dstates[:, :, 1:]).sum(-1)  # b heads chunks d
        dg[:, :, :: plan.span] = dwhole if g.shape[3] > 1 else dwhole.sum(-1, keepdim=True)
    return dq, dk, dv, dg, dstates[:, :, 0].to(initial_state.dtype, copy=True)


@_causal_backward.register_fake
def _(dout, dstate, q, k, v, g, initial_state, block):
    dg = q.new_empty(0) if g is None else g.new_empty(g.shape)
    return *(_empty(t, t.dtype) for t in (q, k, v)), dg, initial_state.new_empty(initial_state.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.block, _ = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx, dout, dstate):
    *grads, dg, dinitial = _causal_backward(dout, dstate, *ctx.saved_tensors, ctx.block)
    return *grads, None if ctx.saved_tensors[3] is None else dg, dinitial, None, None


_causal.register_autograd(_grad, setup_context=_save)


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, block: int, initial_state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    g = None if log_decay is None else by_block(log_decay, block)
    return _causal(q, k, v, g, initial_state, block, dtype)
