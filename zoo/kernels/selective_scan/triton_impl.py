"""Chunks of tokens as tiles (channels, states, tokens), scanned along the tokens; the state stays in registers.

Forward: a program takes some channels of a piece, which is one path of one sample, from chunk to chunk, and keeps the
state before each. Backward: a first kernel goes back the same way for the gradients of those states alone. The second
takes each chunk for itself, computes its states anew and goes through the channels, so that the gradients of B and C
add up in registers. Sums over chunks, samples and shares of the channels are written apart and added by torch: no
atomics, the same result every time. No decay is ever divided by.

Registered as `zoo::selective_scan_triton`, so that torch.compile sees one node.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.chips import tuned
from zoo.kernels.rounding import narrow

from .tuning import PROGRAMS, TILES, VALUES


@triton.jit
def _compose(a1, x1, a2, x2):
    return a1 * a2, a2 * x1 + x2


@triton.jit
def _softplus(x):
    grown = tl.exp(tl.minimum(x, 20.0))
    more = 1.0 + grown
    return tl.where(x > 20.0, x, tl.log(more) - ((more - 1.0) - grown) / more)  # what the sum rounds away is put back


@triton.jit
def _tokens(orders_ptr, path, t, n, inside):
    if orders_ptr is not None:
        t = tl.load(orders_ptr + path * n + t, mask=inside, other=0)
    return t.to(tl.int64)


@triton.jit
def _read(ptr, rows, along_rows, columns, along_columns, inside_rows, inside_columns, wide: tl.constexpr):
    """Tile (rows, columns); zero outside."""
    inside = inside_rows[:, None] & inside_columns[None]
    at = rows[:, None].to(tl.int64) * along_rows + columns[None] * along_columns
    x = tl.load(ptr + at, mask=inside, other=0.0)
    return x.to(wide)


@triton.jit
def _write(ptr, at, x, inside):
    tl.store(ptr + at, narrow(x, ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weights(ptr, channel, token, state, along_x, along_s, in_d, in_t, in_s, wide: tl.constexpr, FIXED: tl.constexpr):
    """B or C as (channels, states, 1) where all tokens share it, else as (1, states, tokens)."""
    if FIXED:
        return _read(ptr, channel, along_x, state, along_s, in_d, in_s, wide)[:, :, None]
    return _read(ptr, state, along_s, token, along_x, in_s, in_t, wide)[None]


@triton.jit
def _steps(ptr, channel, along_d, token, along_n, in_d, in_t, bias_ptr, SOFTPLUS: tl.constexpr, wide: tl.constexpr):
    """Step sizes (channels, tokens), before and after softplus; tokens outside take no step."""
    raw = _read(ptr, channel, along_d, token, along_n, in_d, in_t, wide)
    if bias_ptr is not None:
        raw += tl.load(bias_ptr + channel, mask=in_d, other=0.0)[:, None]
    return raw, tl.where(in_t[None], _softplus(raw) if SOFTPLUS else raw, 0.0)


@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, initial_ptr, orders_ptr, y_ptr, last_ptr, states_ptr,
    pieces, r, d, n, s,
    u_b, u_r, u_d, u_n, dt_b, dt_r, dt_d, dt_n, B_b, B_r, B_s, B_x, C_b, C_r, C_s, C_x, z_b, z_r, z_d, z_n,
    FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr,
    E: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = A_ptr.dtype.element_ty
    blocks = tl.cdiv(d, E)
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    sample, path = piece // r, piece % r
    channel, state, place = tl.program_id(0) % blocks * E + tl.arange(0, E), tl.arange(0, S), tl.arange(0, T)
    in_d, in_s = channel < d, state < s
    in_h = in_d[:, None] & in_s[None]
    at_h = channel[:, None] * s + state[None]
    rate = _read(A_ptr + path * d * s, channel, s, state, 1, in_d, in_s, wide) * 1.4426950408889634  # for exp2
    h = tl.zeros((E, S), wide)
    if initial_ptr is not None:
        h = tl.load(initial_ptr + piece * d * s + at_h, mask=in_h, other=0.0)
    if bias_ptr is not None:
        bias_ptr += path * d
    u_ptr += sample * u_b + path * u_r
    delta_ptr += sample * dt_b + path * dt_r
    B_ptr += sample * B_b + path * B_r
    C_ptr += sample * C_b + path * C_r
    for start in range(0, n, T):
        if KEEP:
            tl.store(states_ptr + (start // T * pieces + piece) * d * s + at_h, h, mask=in_h)
        t = start + place
        in_t = t < n
        token = _tokens(orders_ptr, path, t, n, in_t)
        _, dt = _steps(delta_ptr, channel, dt_d, token, dt_n, in_d, in_t, bias_ptr, SOFTPLUS, wide)
        u = _read(u_ptr, channel, u_d, token, u_n, in_d, in_t, wide)
        B = _weights(B_ptr, channel, token, state, B_x, B_s, in_d, in_t, in_s, wide, FIXED_B)
        C = _weights(C_ptr, channel, token, state, C_x, C_s, in_d, in_t, in_s, wide, FIXED_C)
        decay = tl.exp2(rate[:, :, None] * dt[:, None])  # e s t
        drive = (dt * u)[:, None] * B
        drive = tl.where(place[None, None] == 0, drive + decay * h[:, :, None], drive)
        _, hs = tl.associative_scan((decay, drive), 2, _compose)
        h = tl.sum(tl.where(place[None, None] == T - 1, hs, 0.0), 2)
        y = tl.sum(hs * C, 1)
        if D_ptr is not None:
            y += tl.load(D_ptr + path * d + channel, mask=in_d, other=0.0)[:, None] * u
        if z_ptr is not None:
            z = _read(z_ptr + sample * z_b + path * z_r, channel, z_d, token, z_n, in_d, in_t, wide)
            y *= z * tl.sigmoid(z)
        _write(y_ptr, (piece * d + channel[:, None]) * n + token[None], y, in_d[:, None] & in_t[None])
    tl.store(last_ptr + piece * d * s + at_h, h, mask=in_h)


@triton.jit
def _carry_kernel(
    dout_ptr, dlast_ptr, delta_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, orders_ptr, dinitial_ptr, dstates_ptr,
    pieces, r, d, n, s,
    do_b, do_r, do_d, do_n, dt_b, dt_r, dt_d, dt_n, C_b, C_r, C_s, C_x, z_b, z_r, z_d, z_n,
    FIXED_C: tl.constexpr, SOFTPLUS: tl.constexpr, E: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Gradients of the states after each chunk, and of the first one."""
    wide: tl.constexpr = A_ptr.dtype.element_ty
    blocks = tl.cdiv(d, E)
    piece = (tl.program_id(0) // blocks).to(tl.int64)
    sample, path = piece // r, piece % r
    channel, state, place = tl.program_id(0) % blocks * E + tl.arange(0, E), tl.arange(0, S), tl.arange(0, T)
    in_d, in_s = channel < d, state < s
    in_h = in_d[:, None] & in_s[None]
    at_h = channel[:, None] * s + state[None]
    rate = _read(A_ptr + path * d * s, channel, s, state, 1, in_d, in_s, wide) * 1.4426950408889634
    dh = tl.zeros((E, S), wide)
    if dlast_ptr is not None:
        dh = tl.load(dlast_ptr + piece * d * s + at_h, mask=in_h, other=0.0)
    if bias_ptr is not None:
        bias_ptr += path * d
    dout_ptr += sample * do_b + path * do_r
    delta_ptr += sample * dt_b + path * dt_r
    C_ptr += sample * C_b + path * C_r
    chunks = tl.cdiv(n, T)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        tl.store(dstates_ptr + (chunk * pieces + piece) * d * s + at_h, dh, mask=in_h)
        t = chunk * T + place
        in_t = t < n
        token = _tokens(orders_ptr, path, t, n, in_t)
        _, dt = _steps(delta_ptr, channel, dt_d, token, dt_n, in_d, in_t, bias_ptr, SOFTPLUS, wide)
        g = _read(dout_ptr, channel, do_d, token, do_n, in_d, in_t, wide)
        if z_ptr is not None:
            z = _read(z_ptr + sample * z_b + path * z_r, channel, z_d, token, z_n, in_d, in_t, wide)
            g *= z * tl.sigmoid(z)
        C = _weights(C_ptr, channel, token, state, C_x, C_s, in_d, in_t, in_s, wide, FIXED_C)
        since = tl.exp2(rate[:, :, None] * tl.cumsum(dt, 1)[:, None])  # e s t: decay since before the chunk
        dh = tl.sum(since * C * g[:, None], 2) + tl.exp2(rate * tl.sum(dt, 1)[:, None]) * dh
    tl.store(dinitial_ptr + piece * d * s + at_h, dh, mask=in_h)


@triton.jit
def _backward_kernel(
    dout_ptr, dstates_ptr, states_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, orders_ptr,
    du_ptr, ddelta_ptr, dz_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    pieces, r, d, n, s, share,
    do_b, do_r, do_d, do_n, u_b, u_r, u_d, u_n, dt_b, dt_r, dt_d, dt_n, B_b, B_r, B_s, B_x, C_b, C_r, C_s, C_x,
    z_b, z_r, z_d, z_n,
    FIXED_B: tl.constexpr, FIXED_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    E: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """All other gradients of one chunk and a share of the channels."""
    wide: tl.constexpr = A_ptr.dtype.element_ty
    piece, chunk = (tl.program_id(0) % pieces).to(tl.int64), tl.program_id(0) // pieces
    sample, path = piece // r, piece % r
    state, place = tl.arange(0, S), tl.arange(0, T)
    in_s, t = state < s, chunk * T + place
    in_t, in_before, in_after = t < n, (place > 0) & (t <= n), t + 1 < n
    token = _tokens(orders_ptr, path, t, n, in_t)
    before, after = _tokens(orders_ptr, path, t - 1, n, in_before), _tokens(orders_ptr, path, t + 1, n, in_after)
    if bias_ptr is not None:
        bias_ptr += path * d
    u_ptr += sample * u_b + path * u_r
    delta_ptr += sample * dt_b + path * dt_r
    B_ptr += sample * B_b + path * B_r
    C_ptr += sample * C_b + path * C_r
    dB, dC = tl.zeros((S, T), wide), tl.zeros((S, T), wide)
    part = chunk.to(tl.int64) * pieces + piece
    first = tl.program_id(1) * share
    for corner in range(first, tl.minimum(first + share, d), E):
        channel = corner + tl.arange(0, E)
        in_d = channel < d
        in_h, in_x = in_d[:, None] & in_s[None], in_d[:, None] & in_t[None]
        at_h, at_x = part * d * s + channel[:, None] * s + state[None], (piece * d + channel[:, None]) * n + token[None]
        A = _read(A_ptr + path * d * s, channel, s, state, 1, in_d, in_s, wide)
        rate = A[:, :, None] * 1.4426950408889634
        B = _weights(B_ptr, channel, token, state, B_x, B_s, in_d, in_t, in_s, wide, FIXED_B)
        C = _weights(C_ptr, channel, token, state, C_x, C_s, in_d, in_t, in_s, wide, FIXED_C)
        raw, dt = _steps(delta_ptr, channel, dt_d, token, dt_n, in_d, in_t, bias_ptr, SOFTPLUS, wide)
        u = _read(u_ptr, channel, u_d, token, u_n, in_d, in_t, wide)
        # What is left of the state before each token: the scan takes in the token before, so that nothing cancels.
        _, dt_before = _steps(delta_ptr, channel, dt_d, before, dt_n, in_d, in_before, bias_ptr, SOFTPLUS, wide)
        u_before = _read(u_ptr, channel, u_d, before, u_n, in_d, in_before, wide)
        B_before = _weights(B_ptr, channel, before, state, B_x, B_s, in_d, in_before, in_s, wide, FIXED_B)
        h = tl.load(states_ptr + at_h, mask=in_h, other=0.0)
        decay = tl.exp2(rate * dt[:, None])  # e s t
        drive = (dt_before * u_before)[:, None] * B_before
        drive = decay * tl.where(place[None, None] == 0, h[:, :, None], drive)
        _, left = tl.associative_scan((decay, drive), 2, _compose)
        hs = left + (dt * u)[:, None] * B
        g = _read(dout_ptr + sample * do_b + path * do_r, channel, do_d, token, do_n, in_d, in_t, wide)
        direct = tl.zeros((E,), wide)
        if D_ptr is not None:
            direct = tl.load(D_ptr + path * d + channel, mask=in_d, other=0.0)
        if z_ptr is not None:
            z = _read(z_ptr + sample * z_b + path * z_r, channel, z_d, token, z_n, in_d, in_t, wide)
            gate = tl.sigmoid(z)
            y = tl.sum(hs * C, 1) + direct[:, None] * u
            _write(dz_ptr, at_x, g * y * gate * (1.0 + z * (1.0 - gate)), in_x)
            g *= z * gate
        # Gradients of the states, from the last token back.
        _, dt_after = _steps(delta_ptr, channel, dt_d, after, dt_n, in_d, in_after, bias_ptr, SOFTPLUS, wide)
        dh = tl.load(dstates_ptr + at_h, mask=in_h, other=0.0)
        drive = g[:, None] * C + tl.where(place[None, None] == T - 1, dh[:, :, None], 0.0)
        _, dhs = tl.associative_scan((tl.exp2(rate * dt_after[:, None]), drive), 2, _compose, reverse=True)
        share_B, share_C = dhs * (dt * u)[:, None], hs * g[:, None]
        if FIXED_B:
            tl.store(dB_ptr + at_h, tl.sum(share_B, 2), mask=in_h)
        else:
            dB += tl.sum(share_B, 0)
        if FIXED_C:
            tl.store(dC_ptr + at_h, tl.sum(share_C, 2), mask=in_h)
        else:
            dC += tl.sum(share_C, 0)
        dinput = tl.sum(dhs * B, 1)  # of dt u
        left *= dhs
        tl.store(dA_ptr + at_h, tl.sum(left * dt[:, None], 2), mask=in_h)
        ddt = tl.sum(left * A[:, :, None], 1) + dinput * u
        if SOFTPLUS:
            ddt *= tl.where(raw > 20.0, 1.0, tl.sigmoid(raw))
        ddt = tl.where(in_x, ddt, 0.0)
        _write(ddelta_ptr, at_x, ddt, in_x)
        _write(du_ptr, at_x, dinput * dt + direct[:, None] * g, in_x)
        tl.store(dbias_ptr + part * d + channel, tl.sum(ddt, 1), mask=in_d)
        tl.store(dD_ptr + part * d + channel, tl.sum(g * u, 1), mask=in_d)
    in_w = in_s[:, None] & in_t[None]
    at_w = ((tl.program_id(1) * pieces + piece) * s + state[:, None]) * n + token[None]
    if not FIXED_B:
        tl.store(dB_ptr + at_w, dB, mask=in_w)
    if not FIXED_C:
        tl.store(dC_ptr + at_w, dC, mask=in_w)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, orders: Tensor | None, softplus: bool, chunk: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    floats = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    n, states = delta.shape[3], triton.next_power_of_2(A.shape[2])
    size = chunk or max(16, min(64, VALUES // states))
    return _scan(*floats, orders, softplus, min(size, triton.next_power_of_2(max(n, 1))), keep)[:2]


@torch.library.custom_op("zoo::selective_scan_triton", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, initial_state: Tensor | None, orders: Tensor | None, softplus: bool, chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, last state, and the state before each chunk, (chunks, (b r), d, s), or none of those."""
    (b, r, d, n), s = delta.shape, A.shape[2]
    A, D, delta_bias, initial_state, orders = _plain(u, A, D, delta_bias, initial_state, orders)
    y, last = u.new_empty(b, r, d, n), A.new_empty(b, r, d, s)
    states = A.new_empty(triton.cdiv(n, chunk) if keep else 0, b * r, d, s)
    tile = tuned(TILES, u)
    shape = _shape(tile.values, d, s, chunk)
    if b:
        _forward_kernel[(b * r * triton.cdiv(d, shape["E"]),)](
            u, delta, A, B, C, D, z, delta_bias, initial_state, orders, y, last, states,
            b * r, r, d, n, s, *u.stride(), *delta.stride(), *_strides(B), *_strides(C), *_strides(z),
            FIXED_B=B.ndim == 3, FIXED_C=C.ndim == 3, SOFTPLUS=softplus, KEEP=keep, **shape, num_warps=tile.warps,
        )  # fmt: skip
    return y, last, states


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    (b, r, d, n), s, (chunk, keep) = delta.shape, A.shape[2], more[-2:]
    last = u.new_empty(b, r, d, s, dtype=_wide(u))
    return u.new_empty(b, r, d, n), last, last.new_empty(-(-n // chunk) if keep else 0, b * r, d, s)


@torch.library.custom_op("zoo::selective_scan_triton_backward", mutates_args=())
def _backward(
    dout: Tensor, dlast: Tensor | None, states: Tensor,
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, orders: Tensor | None, softplus: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state; anything for those that are missing."""
    (b, r, d, n), s, chunks = delta.shape, A.shape[2], len(states)
    A, D, delta_bias, dlast, orders = _plain(u, A, D, delta_bias, dlast, orders)
    tile = tuned(TILES, u)
    shape, back = _shape(tile.values, d, s, chunk), _shape(tile.back_values, d, s, chunk)
    share = triton.cdiv(triton.cdiv(d, back["E"]), max(1, PROGRAMS // max(1, chunks * b * r))) * back["E"]
    shares = triton.cdiv(d, share)
    du, ddelta, dz = (x.new_empty(b, r, d, n) for x in (u, delta, u))
    dstates, dinitial = torch.empty_like(states), A.new_empty(b, r, d, s)
    dA, dD, dbias = (A.new_empty(chunks, b, r, d, *more) for more in ((s,), (), ()))  # shares of chunks and samples
    dB, dC = (A.new_empty((chunks, b, r, d, s) if x.ndim == 3 else (shares, b, r, s, n)) for x in (B, C))
    if b:
        _carry_kernel[(b * r * triton.cdiv(d, shape["E"]),)](
            dout, dlast, delta, A, C, z, delta_bias, orders, dinitial, dstates,
            b * r, r, d, n, s, *dout.stride(), *delta.stride(), *_strides(C), *_strides(z),
            FIXED_C=C.ndim == 3, SOFTPLUS=softplus, **shape, num_warps=tile.warps,
        )  # fmt: skip
    if b and n:
        _backward_kernel[(b * r * chunks, shares)](
            dout, dstates, states, u, delta, A, B, C, D, z, delta_bias, orders,
            du, ddelta, dz, dA, dB, dC, dD, dbias, b * r, r, d, n, s, share,
            *dout.stride(), *u.stride(), *delta.stride(), *_strides(B), *_strides(C), *_strides(z),
            FIXED_B=B.ndim == 3, FIXED_C=C.ndim == 3, SOFTPLUS=softplus, **back, num_warps=tile.back_warps,
        )  # fmt: skip
    dA, dD, dbias = (x.sum((0, 1)) for x in (dA, dD, dbias))
    dB, dC = (x.sum((0, 1) if w.ndim == 3 else 0) for x, w in ((dB, B), (dC, C)))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


@_backward.register_fake
def _(dout: Tensor, dlast: Tensor | None, states: Tensor, u: Tensor, delta: Tensor, *more: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    (b, r, d, n), s = delta.shape, states.shape[3]
    du, ddelta, dz = (x.new_empty(b, r, d, n) for x in (u, delta, u))
    dB, dC = (states.new_empty((b, r, s, n) if x.ndim == 4 else (r, d, s)) for x in more[1:3])
    dA, dD, dbias, dinitial = (states.new_empty(shape) for shape in ((r, d, s), (r, d), (r, d), (b, r, d, s)))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    *floats, orders, ctx.softplus, ctx.chunk, _ = inputs
    ctx.save_for_backward(output[2], orders, *floats)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    states, orders, *floats = ctx.saved_tensors
    dout = torch.zeros_like(floats[1]) if dout is None else dout
    found = _backward(dout, dlast, states, *floats[:-1], orders, ctx.softplus, ctx.chunk)
    return *(None if x is None else g.to(x.dtype) for g, x in zip(found, floats, strict=True)), *[None] * 4


_scan.register_autograd(_grad, setup_context=_save)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _plain(u: Tensor, *small: Tensor | None) -> Iterator[Tensor | None]:
    """Small tensors without gaps, in float32 or wider if they are float."""
    for x in small:
        yield x if x is None else x.to(_wide(u) if x.is_floating_point() else x.dtype).contiguous()


def _shape(values: int, d: int, s: int, chunk: int) -> dict[str, int]:
    """Channels, states and tokens of a tile."""
    S = triton.next_power_of_2(s)
    return {"E": max(1, min(triton.next_power_of_2(d), values // (S * chunk))), "S": S, "T": chunk}


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of (b, r, d or s, n), or as (b, r, s, d) of (r, d, s), which all samples share."""
    if x is None:
        return (0, 0, 0, 0)
    return x.stride() if x.ndim == 4 else (0, x.stride(0), x.stride(2), x.stride(1))
