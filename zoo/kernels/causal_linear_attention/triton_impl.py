"""Three kernels forward: sums over chunks, their running total, and the output of each chunk; the same backward.

A tile of C rows is a chunk: blocks of `block` tokens, each padded to M rows, a power of two. The decay of a pair of
tokens inside of it is exp of a sum of its own, never a quotient: by token from a scan over all pairs, by channel key by
key. Blocks longer than a tile are chunks of their own, whose queries read the state after them.

States are float32, one for each chunk; the backward makes them anew. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.rounding import dot, load, store

from .decay import by_block
from .plan import Plan, plan

# Half-precision tokens are exact as tf32, and states and weights keep more digits than in bf16, and more range than in
# float16. For float32 tf32 would be too coarse.
_PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32", torch.float32: "ieee"}


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
    g = load(g_ptr, token, gn, column, gd, there[:, None] & (column < width)[None, :])
    token, there = _tokens(row + 1, first, stop, block, C, M)
    return g, load(g_ptr, token, gn, column, gd, there[:, None] & (column < width)[None, :])


@triton.jit
def _decays(g, after):
    """Decay from before the tile to each row, and from each row to the end of the tile."""
    return tl.exp(tl.cumsum(g, 0)), tl.exp(tl.cumsum(after, 0, reverse=True))


@triton.jit
def _pair_decays(g, C: tl.constexpr):
    """Decay from row j to row i, where it is one for all channels; sums of their own for every pair, (C, C)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.exp(tl.cumsum(tl.where(i > j, g, 0.0), 0))


@triton.jit
def _row(ptr, at, along_rows, along, first, stop, block, width, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr):
    """Row `at` of a tile, (D,)."""
    column = tl.arange(0, D)
    token, there = _tokens(at + column * 0, first, stop, block, C, M)
    ptr += token.to(tl.int64) * along_rows + column * along
    return tl.load(ptr, mask=there & (column < width), other=0.0).to(tl.float32)


@triton.jit
def _pairs(
    q, k, g, g_ptr, gn, gd, k_ptr, kn, kd, first, stop, rows, block, d,
    G: tl.constexpr, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of values inside of a tile, (C, C)."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if G <= 1:
        pairs = dot(q, tl.trans(k), tl.zeros((C, C), tl.float32), PRECISION)
        if G == 1:
            pairs *= _pair_decays(g, C)
    else:
        pairs, logs = tl.zeros((C, C), tl.float32), tl.zeros((C, D), tl.float32)
        for step in range(rows):  # keys from the last to the first, so that sums of gates grow by one gate a step
            at = rows - 1 - step
            key = _row(k_ptr, at, kn, kd, first, stop, block, d, C, M, D)
            pairs = tl.where(j == at, tl.sum(q * key[None, :] * tl.exp(logs), 1)[:, None], pairs)
            logs += tl.where(i >= at, _row(g_ptr, at, gn, gd, first, stop, block, d, C, M, D)[None, :], 0.0)
    return tl.where(i // M >= j // M, pairs, 0.0)


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
    stop, width = tl.minimum(chunk * span + span, n), 1 if G == 1 else d
    g_ptr += b * gb + h * gh
    sums = tl.zeros((D, E), tl.float32)
    for first in range(chunk * span, stop, C if OWN else span):
        token, there = _tokens(row, first, stop, block, C, M)
        x = load(x_ptr + b * xb + h * xh, token, xn, ds, xd, there[:, None] & (ds < d)[None, :])
        y = load(y_ptr + b * yb + h * yh, token, yn, es, ye, there[:, None] & (es < e)[None, :])
        if G > 0 and not OWN:
            g, after = _gates(g_ptr, gn, gd, first, stop, block, width, C, M, G)
            to_query, from_key = _decays(g, after)
            x *= from_key if KEYS else to_query
        sums = dot(tl.trans(x), y, sums, PRECISION)
    if G > 0 and KEYS:
        # The decay of a block lies at its first token, so that the first tile holds all of it.
        column = tl.arange(0, G)
        g, after = _gates(g_ptr, gn, gd, chunk * span, stop, block, width, C, M, G)
        tl.store(whole_ptr + (bh * chunks + chunk) * width + column, tl.exp(tl.sum(g, 0)), mask=column < width)
    sums_ptr += (bh * (chunks + 1) + chunk + slot) * d * e
    store(sums_ptr, sums, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])


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
    BACK: tl.constexpr, OWN: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Read the state and the values with queries; BACK, gradients of the state and of the output with keys."""
    tile, bh = tl.program_id(0) % (chunks * tiles), (tl.program_id(0) // (chunks * tiles)).to(tl.int64)
    b, h, chunk = bh // heads, bh % heads, tile // tiles
    first, stop = chunk * span + tile % tiles * C, tl.minimum(chunk * span + span, n)
    ds, es = tl.arange(0, D), tl.program_id(1) * E + tl.arange(0, E)
    token, there = _tokens(tl.arange(0, C), first, stop, block, C, M)
    rows = tl.max(tl.where(there, tl.arange(0, C) + 1, 0), 0)  # a loop of unknown length is not unrolled into spills
    of_d, of_e = there[:, None] & (ds < d)[None, :], there[:, None] & (es < e)[None, :]
    k_ptr += b * kb + h * kh
    g_ptr += b * gb + h * gh
    q = load(q_ptr + b * qb + h * qh, token, qn, ds, qd, of_d)
    k = load(k_ptr, token, kn, ds, kd, of_d)
    x, decay = k if BACK else q, 1.0
    states_ptr += (bh * (chunks + 1) + chunk + (1 if OWN or BACK else 0)) * d * e
    o = tl.zeros((C, E), tl.float32)
    if not OWN:
        g = 0.0
        if G > 0:
            g, after = _gates(g_ptr, gn, gd, first, stop, block, 1 if G == 1 else d, C, M, G)
            to_query, from_key = _decays(g, after)
            decay = from_key if BACK else to_query
        pairs = _pairs(q, k, g, g_ptr, gn, gd, k_ptr, kn, kd, first, stop, rows, block, d, G, C, M, D, PRECISION)
        v = load(v_ptr + b * vb + h * vh, token, vn, es, ve, of_e)
        o = dot(tl.trans(pairs) if BACK else pairs, v, o, PRECISION)
    state = load(states_ptr, ds, e, es, 1, (ds < d)[:, None] & (es < e)[None, :])
    store(o_ptr + b * ob + h * oh, dot(x * decay, state, o, PRECISION), token, on, es, oe, of_e)


@triton.jit
def _gradient_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, do_ptr, states_ptr, dstates_ptr, dq_ptr, dk_ptr, dg_ptr,
    qb, qh, qn, qd, kb, kh, kn, kd, vb, vh, vn, ve, gb, gh, gn, gd, ob, oh, on, oe,
    heads, n, d, e, chunks, tiles, span, block,
    OWN: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and decays, computed as (d, tokens): warps share the longer side of a product."""
    tile, bh = tl.program_id(0) % (chunks * tiles), (tl.program_id(0) // (chunks * tiles)).to(tl.int64)
    b, h, chunk = bh // heads, bh % heads, tile // tiles
    first, stop = chunk * span + tile % tiles * C, tl.minimum(chunk * span + span, n)
    ds = tl.arange(0, D)
    token, there = _tokens(tl.arange(0, C), first, stop, block, C, M)
    rows = tl.max(tl.where(there, tl.arange(0, C) + 1, 0), 0)  # a loop of unknown length is not unrolled into spills
    of_d = (ds < d)[:, None] & there[None, :]
    k_ptr += b * kb + h * kh
    g_ptr += b * gb + h * gh
    dstates_ptr += (bh * (chunks + 1) + chunk + 1) * d * e  # of the state after this chunk
    states_ptr += (bh * (chunks + 1) + chunk + (1 if OWN else 0)) * d * e  # the one that queries read
    dpairs, dwhole = tl.zeros((C, C), tl.float32), tl.zeros((D,), tl.float32)
    dq, dk = tl.zeros((D, C), tl.float32), tl.zeros((D, C), tl.float32)
    for start in range(0, e, E):
        es = start + tl.arange(0, E)
        of_e, of_state = there[:, None] & (es < e)[None, :], (ds < d)[:, None] & (es < e)[None, :]
        do = load(do_ptr + b * ob + h * oh, token, on, es, oe, of_e)
        v = load(v_ptr + b * vb + h * vh, token, vn, es, ve, of_e)
        state, dstate = load(states_ptr, ds, e, es, 1, of_state), load(dstates_ptr, ds, e, es, 1, of_state)
        dq = dot(state, tl.trans(do), dq, PRECISION)
        dk = dot(dstate, tl.trans(v), dk, PRECISION)
        if not OWN:
            dwhole += tl.sum(state * dstate, 1)
            dpairs = dot(do, tl.trans(v), dpairs, PRECISION)
    if not OWN:
        i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        dpairs = tl.where(i // M >= j // M, dpairs, 0.0)
        q = load(q_ptr + b * qb + h * qh, ds, qd, token, qn, of_d)
        k = load(k_ptr, ds, kd, token, kn, of_d)
        if G > 0:
            width = 1 if G == 1 else d
            g, after = _gates(g_ptr, gn, gd, first, stop, block, width, C, M, G)
            to_query, from_key = _decays(g, after)
            dq *= tl.trans(to_query)
            dk *= tl.trans(from_key)
            of_queries, of_keys, of_whole = q * dq, k * dk, (tl.exp(tl.sum(g, 0)) * dwhole)[:, None]
            if G == 1:
                of_queries, of_keys = tl.sum(of_queries, 0)[None, :], tl.sum(of_keys, 0)[None, :]
                of_whole = tl.sum(of_whole, 0)[None, :]
            dg = tl.cumsum(of_queries, 1, reverse=True) + tl.cumsum(of_keys, 1) - of_keys + of_whole
            dearlier = tl.where(i // M > j // M, dpairs, 0.0)  # of pairs with a decay
        if G == 1:
            decays = _pair_decays(g, C)
            pairs = decays * dot(tl.trans(q), k, tl.zeros((C, C), tl.float32), PRECISION)
            of_pairs = tl.where(i > j, tl.cumsum(dearlier * pairs, 0, reverse=True), 0.0)
            dg += tl.sum(of_pairs, 1)[None, :]
            dpairs *= decays
        if G > 1:
            dqs, dks, logs = tl.zeros((D, C), tl.float32), tl.zeros((D, C), tl.float32), tl.zeros((D, C), tl.float32)
            for step in range(rows):
                at = rows - 1 - step
                dpair = tl.sum(tl.where(j == at, dearlier, 0.0), 1)[None, :] * tl.exp(logs)
                dqs += dpair * _row(k_ptr, at, kn, kd, first, stop, block, d, C, M, D)[:, None]
                dks = tl.where(j == at, tl.sum(dpair * q, 1)[:, None], dks)
                logs += tl.where(j >= at, _row(g_ptr, at, gn, gd, first, stop, block, d, C, M, D)[:, None], 0.0)
            # What crosses a token: pairs of a later query, less those whose key is later too.
            dg += tl.cumsum(q * dqs - k * dks, 1, reverse=True)
            dpairs -= dearlier
            dq, dk = dq + dqs, dk + dks
        if G > 0:
            gs = tl.arange(0, G)
            store(dg_ptr + bh * n * width, dg, gs, 1, token, width, (gs < width)[:, None] & there[None, :])
        dq = dot(k, tl.trans(dpairs), dq, PRECISION)
        dk = dot(q, dpairs, dk, PRECISION)
    store(dq_ptr + (b * n * heads + h) * d, dq, ds, 1, token, heads * d, of_d)
    store(dk_ptr + (b * n * heads + h) * d, dk, ds, 1, token, heads * d, of_d)


def _shape(how: Plan, x: Tensor, g: Tensor | None) -> dict[str, object]:
    gates = 0 if g is None else 1 if g.shape[3] == 1 else how.wide
    shape = {"G": gates, "C": how.rows, "M": how.padded, "D": how.wide, "E": how.values, "OWN": how.own}
    return shape | {"PRECISION": _PRECISION[x.dtype], "num_warps": how.warps, "num_stages": 1}


def _sums(
    x: Tensor, g: Tensor | None, y: Tensor, edge: Tensor, whole: Tensor | None, how: Plan, keys: bool
) -> tuple[Tensor, Tensor | None]:
    """States before each chunk and the last, (b, heads, chunks + 1, d, e), and the decay over chunks.

    Or, for queries and gradients of the output, the gradients of these states.
    """
    (b, heads, n, d), e = x.shape, y.shape[3]
    sums, gates = x.new_empty(b, heads, how.chunks + 1, d, e, dtype=torch.float32), x if g is None else g
    if keys and g is not None:
        whole = sums.new_empty(b, heads, how.chunks, g.shape[3])
    sums[:, :, 0 if keys else -1] = edge
    _sum_kernel[how.chunks * b * heads, triton.cdiv(e, how.values)](
        x, gates, y, sums, whole, *x.stride(), *gates.stride(), *y.stride(),
        heads, n, d, e, how.chunks, how.span, how.block, int(keys or how.own), KEYS=keys, **_shape(how, x, g),
    )  # fmt: skip
    if not keys and how.own:  # the last chunk reads the last state
        sums[:, :, -1] += edge
    _carry_kernel[b * heads, triton.cdiv(d * e, 512)](
        sums, whole, how.chunks, d, e, BACK=not keys, OWN=how.own, G=_shape(how, x, g)["G"], BLOCK=512
    )
    return sums, whole


def _read(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, states: Tensor, out: Tensor, how: Plan, back: bool):
    (b, heads, n, d), e, gates = q.shape, v.shape[3], q if g is None else g
    _output_kernel[how.chunks * how.tiles * b * heads, triton.cdiv(e, how.values)](
        q, k, v, gates, states, out, *q.stride(), *k.stride(), *v.stride(), *gates.stride(), *out.stride(),
        heads, n, d, e, how.chunks, how.tiles, how.span, how.block, BACK=back, **_shape(how, q, g),
    )  # fmt: skip


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads next to the features, as the projections around the attention want them."""
    return x.new_empty(x.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


@torch.library.custom_op("zoo::causal_linear_attention", mutates_args=())
def _causal(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = _empty(v, dtype)
    if not out.numel():
        return out, initial_state.float().clone(memory_format=torch.contiguous_format)
    how = plan(q, v, block)
    states, _ = _sums(k, g, v, initial_state, None, how, keys=True)
    _read(q, k, v, g, states, out, how, back=False)
    return out, states[:, :, -1].clone()


@_causal.register_fake
def _(q, k, v, g, initial_state, block, dtype):
    return _empty(v, dtype), initial_state.new_empty(initial_state.shape, dtype=torch.float32)


@torch.library.custom_op("zoo::causal_linear_attention_backward", mutates_args=())
def _causal_backward(
    dout: Tensor, dstate: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_empty(t, t.dtype) for t in (q, k, v))
    dg = q.new_empty(0) if g is None else g.new_zeros(g.shape)
    if not dv.numel():
        return dq, dk, dv, dg, initial_state.new_empty(initial_state.shape).copy_(dstate)
    how, gates = plan(q, v, block), q if g is None else g
    states, whole = _sums(k, g, v, initial_state, None, how, keys=True)
    dstates, _ = _sums(q, g, dout, dstate, whole, how, keys=False)
    _read(q, k, dout, g, dstates, dv, how, back=True)
    _gradient_kernel[(how.chunks * how.tiles * q.shape[0] * q.shape[1],)](
        q, k, v, gates, dout, states, dstates, dq, dk, dg,
        *q.stride(), *k.stride(), *v.stride(), *gates.stride(), *dout.stride(),
        *q.shape[1:], v.shape[3], how.chunks, how.tiles, how.span, how.block, **_shape(how, q, g),
    )  # fmt: skip
    if g is not None and how.own:  # the decay of a block lies at its first token
        dwhole = whole * (states[:, :, :-1] * dstates[:, :, 1:]).sum(-1)  # b heads chunks d
        dg[:, :, :: how.span] = dwhole if g.shape[3] > 1 else dwhole.sum(-1, keepdim=True)
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
    g = None if log_decay is None else by_block(log_decay, block, torch.float32)
    return _causal(q, k, v, g, initial_state, block, dtype)
