"""A chunk of tokens at a time: whatever does not wait for the token before is one call a chunk, the rest one a token.

Decays, inputs and outputs of a chunk are computed together, in buffers that stay in the cache. A step is one fused
multiply-add on the whole state, channels innermost; no product of decays is ever divided by another, so that any decay
is safe. Paths and samples with small states are worked on together, channels with large ones in parts. The backward
starts each chunk from a state that was kept and computes the others anew.

Registered as `zoo::selective_scan`, so that torch.compile sees one node.
"""

from collections.abc import Iterator
from math import log
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Values of the state that one step updates: of fewer, calls cost more than sums; more leave the first cache.
_STEP = 2**13
# Values of a buffer for a chunk, of which the forward holds two: they should not leave the second cache by far.
_BUFFER = 2**18


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    orders: Tensor | None,
    softplus: bool,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    floats = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    b, r, d, n = delta.shape
    if chunk is None:
        pieces, channels = _shares(b * r, A.shape[2], d)
        chunk = min(max(16, _BUFFER // (pieces * channels * A.shape[2])), 256)
    return _scan(*floats, orders, softplus, max(1, min(chunk, n)), keep)[:2]


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    orders: Tensor | None,
    softplus: bool,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the state before each chunk, (chunks, (b r), s, d), or none of those."""
    b, r, d, n = delta.shape
    state = _to_pieces(initial_state, u, A)
    states = state.new_empty(-(-n // chunk) if keep else 0, *state.shape)
    out = u.new_empty(b, n, r, d)
    with torch.autocast(u.device.type, enabled=False):
        for block in _blocks(delta, A, orders):
            given, h = block.read(u, delta, A, B, C, D, z, delta_bias, softplus), state[block.place]
            a, x = (h.new_empty(chunk, *h.shape) for _ in range(2))
            steps = list(zip(a.unbind(), x.unbind(), strict=True))
            for i in range(0, n, chunk):
                now = given.part(i, chunk)
                if keep:
                    states[(i // chunk, *block.place)] = h
                hs = _states(now, h, a, x, steps)
                h = hs[-1].clone()
                y = _output(now, hs)
                block.write(out, i, y if now.z is None else y.mul_(F.silu(now.z)))
            state[block.place] = h
    return out.permute(0, 2, 3, 1), _from_pieces(state, b, r), states


@_scan.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    (b, r, d, n), s, (chunk, keep) = delta.shape, A.shape[2], more[-2:]
    last = u.new_empty(b, r, d, s, dtype=_wide(u))
    states = last.new_empty(-(-n // chunk) if keep else 0, b * r, s, d)
    return u.new_empty(b, n, r, d).permute(0, 2, 3, 1), last, states


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    orders: Tensor | None,
    softplus: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias and the initial state; anything for those that are missing."""
    b, r, d, n = delta.shape
    dstate = _to_pieces(dlast, u, A)
    du, ddelta, dz = (x.new_empty(b, n, r, d) for x in (u, delta, u))
    dB, dC = (dstate.new_zeros((b, n, r, A.shape[2]) if x.ndim == 4 else dstate.shape) for x in (B, C))
    dA, dD, dbias = torch.empty_like(dstate), *(dstate.new_empty(b * r, d) for _ in range(2))
    with torch.autocast(u.device.type, enabled=False):
        for block in _blocks(delta, A, orders):
            given, dh = block.read(u, delta, A, B, C, D, z, delta_bias, softplus), dstate[block.place]
            a, x, q, spare = (dh.new_empty(chunk, *dh.shape) for _ in range(4))
            steps = list(zip(a.unbind(), x.unbind(), strict=True))
            back = list(zip(q.unbind()[:-1], a.unbind()[1:], q.unbind()[1:], strict=True))
            dout_ = block.tokens(dout, dh.dtype, block.channels)
            dA_, dB_, dC_ = (torch.zeros_like(w) for w in (given.A, given.B, given.C))
            dD_, dbias_ = (torch.zeros_like(given.A[:, 0]) for _ in range(2))
            for i in reversed(range(0, n, chunk)):
                now, h, g = given.part(i, chunk), states[(i // chunk, *block.place)], dout_[i : i + chunk]
                m = len(g)
                hs, left, tmp = _states(now, h, a, x, steps), a[:m], spare[:m]
                if now.z is not None:
                    gate = now.z.sigmoid()
                    slope = (1 - gate).mul_(now.z).add_(1).mul_(gate)
                    block.write(dz, i, _output(now, hs).mul_(g).mul_(slope))
                    g = g * gate.mul_(now.z)
                dhs = torch.mul(g[:, :, None], now.C, out=q[:m])  # t p s d
                dhs[-1] += dh
                for dh_now, decay, dh_then in reversed(back[: m - 1]):
                    dh_now.addcmul_(decay, dh_then)
                dh = left[0] * dhs[0]
                left[1:].mul_(hs[:-1])  # what is left of the state before
                left[0].mul_(h)
                _add(dC_, i, torch.mul(hs, g[:, :, None], out=tmp))
                _add(dB_, i, torch.mul(dhs, now.input[:, :, None], out=tmp))
                left.mul_(dhs)
                dA_ += torch.mul(left, now.dt[:, :, None], out=tmp).sum(0)
                dinput = _over_state(dhs, now.B)
                ddt = torch.mul(left, now.A, out=tmp).sum(2).addcmul_(dinput, now.u)
                if softplus:
                    ddt.mul_(torch.where(now.dt > 20, 1.0, -(-now.dt).expm1()))
                dbias_ += ddt.sum(0)
                block.write(ddelta, i, ddt)
                dinput.mul_(now.dt)
                if now.D is not None:
                    dD_ += (g * now.u).sum(0)
                    dinput.addcmul_(g, now.D)
                block.write(du, i, dinput)
            dstate[block.place], dA[block.place] = dh, dA_
            dD[block.place[::2]], dbias[block.place[::2]] = dD_, dbias_
            for total, share in ((dB, dB_), (dC, dC_)):
                block.add(total, share)
    du, ddelta, dz, dB, dC = (x.permute(0, 2, 3, 1) if x.ndim == 4 else x for x in (du, ddelta, dz, dB, dC))
    dA, dB, dC = (x if x.ndim == 4 else _from_pieces(x, b, r).sum(0) for x in (dA, dB, dC))
    dD, dbias = (x.unflatten(0, (b, r)).sum(0) for x in (dD, dbias))
    return du, ddelta, dA, dB, dC, dD, dz, dbias, _from_pieces(dstate, b, r)


@_backward.register_fake
def _(
    dout: Tensor,
    dlast: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    *more: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (b, r, d, n), s = delta.shape, states.shape[2]
    new = lambda *shape: states.new_empty(shape)
    du, ddelta, dz = (x.new_empty(b, n, r, d).permute(0, 2, 3, 1) for x in (u, delta, u))
    dB, dC = (new(b, n, r, s).permute(0, 2, 3, 1) if x.ndim == 4 else new(r, d, s) for x in more[1:3])
    return du, ddelta, new(r, d, s), dB, dC, new(r, d), dz, new(r, d), new(b, r, d, s)


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


class _Given(NamedTuple):
    """What a block or a chunk of it reads, in float32 or wider; tokens in the order of visits."""

    dt: Tensor  # n p d; of a block: delta
    u: Tensor  # n p d
    z: Tensor | None  # n p d
    A: Tensor  # p s d
    log2_decay: Tensor  # p s d
    B: Tensor  # n p s 1, or p s d
    C: Tensor  # n p s 1, or p s d
    D: Tensor | None  # p d
    delta_bias: Tensor | None  # p d
    softplus: bool

    @property
    def input(self) -> Tensor:
        return self.dt * self.u

    def part(self, first: int, count: int) -> "_Given":
        now = slice(first, first + count)
        B, C = (x[now] if x.ndim == 4 else x for x in (self.B, self.C))
        dt = self.dt[now] if self.delta_bias is None else self.dt[now] + self.delta_bias
        dt = F.softplus(dt) if self.softplus else dt
        return self._replace(dt=dt, u=self.u[now], z=None if self.z is None else self.z[now], B=B, C=C)


class _Block(NamedTuple):
    """Some pieces, each one path of one sample, and some of their channels."""

    pieces: list[tuple[int, int]]  # sample and path
    place: tuple[slice, slice, slice]  # in (b r) s d
    orders: Tensor | None  # r n

    @property
    def channels(self) -> slice:
        return self.place[2]

    def read(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        softplus: bool,
    ) -> _Given:
        wide = _wide(u)
        of_path = lambda x: torch.stack([x[r, self.channels].to(wide) for _, r in self.pieces]).mT  # p d or p s d
        delta, u = (self.tokens(x, wide, self.channels) for x in (delta, u))
        z = None if z is None else self.tokens(z, wide, self.channels)
        rates = of_path(A).contiguous()
        B, C = (of_path(x) if x.ndim == 3 else self.tokens(x, wide, slice(None))[..., None] for x in (B, C))
        D, delta_bias = (None if x is None else of_path(x[..., None])[:, 0] for x in (D, delta_bias))
        return _Given(delta, u, z, rates, rates / log(2), B, C, D, delta_bias, softplus)

    def tokens(self, x: Tensor, dtype: torch.dtype, channels: slice) -> Tensor:
        """Vectors (n, p, *) of tokens (b, r, *, n)."""
        found = []
        for b, r in self.pieces:
            rows = x[b, r, channels].to(dtype).T.contiguous()  # n d: torch turns matrices fast, larger tensors slowly
            found.append(rows if self.orders is None else rows.index_select(0, self.orders[r]))
        return found[0][:, None] if len(found) == 1 else torch.stack(found, 1)

    def write(self, out: Tensor, first: int, values: Tensor) -> None:
        """Put values (t, p, d), in the order of visits from the `first`, to their places in (b, n, r, d)."""
        now = slice(first, first + len(values))
        for (b, r), value in zip(self.pieces, values.to(out.dtype).unbind(1), strict=True):
            if self.orders is None:
                out[b, now, r, self.channels] = value
            else:
                out[b, :, r, self.channels].index_copy_(0, self.orders[r, now], value)

    def add(self, total: Tensor, shares: Tensor) -> None:
        """Add the share of these channels to the gradient of B or C, (b, n, r, s), or put it to ((b r), s, d)."""
        if shares.ndim == 3:
            total[self.place] = shares
            return
        for (b, r), share in zip(self.pieces, shares.squeeze(3).unbind(1), strict=True):
            if self.orders is None:
                total[b, :, r] += share
            else:
                total[b, :, r].index_add_(0, self.orders[r], share)


def _blocks(delta: Tensor, A: Tensor, orders: Tensor | None) -> Iterator[_Block]:
    """Cut the problem into blocks whose states have about `_STEP` values."""
    b, r, d, _ = delta.shape
    together, channels = _shares(b * r, A.shape[2], d)
    for p in range(0, b * r, together):
        pieces = [divmod(i, r) for i in range(p, min(p + together, b * r))]
        for c in range(0, d, channels):
            yield _Block(pieces, (slice(p, p + together), slice(None), slice(c, c + channels)), orders)


def _shares(pieces: int, s: int, d: int) -> tuple[int, int]:
    """How many pieces, and how many channels of each, are worked on together."""
    parts = max(1, round(s * d / _STEP))
    return max(1, min(pieces, _STEP // (s * d))), -(-d // parts)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _to_pieces(state: Tensor | None, u: Tensor, A: Tensor) -> Tensor:
    """A state (b, r, d, s), zero when None, as ((b r), s, d)."""
    pieces = torch.zeros(len(u) * len(A), A.shape[2], A.shape[1], dtype=_wide(u), device=u.device)
    return pieces if state is None else pieces.copy_(state.flatten(0, 1).mT)


def _from_pieces(state: Tensor, b: int, r: int) -> Tensor:
    return state.mT.unflatten(0, (b, r)).contiguous()  # b r d s


def _states(part: _Given, h: Tensor, a: Tensor, x: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Fill the buffers: decays to `a`, and the states after each token to `x`, which is returned; (t, p, s, d)."""
    m = len(part.dt)
    torch.mul(part.dt[:, :, None], part.log2_decay, out=a[:m]).exp2_()  # four times as fast as exp_
    torch.mul(part.input[:, :, None], part.B, out=x[:m])
    for decay, state in steps[:m]:
        h = state.addcmul_(decay, h)
    return x[:m]


def _over_state(hs: Tensor, weights: Tensor) -> Tensor:
    """Sum of (t, p, s, d) over s, weighted by (t, p, s, 1) or (p, s, d); (t, p, d)."""
    if weights.ndim == 3:
        return (hs * weights).sum(2)
    return torch.bmm(weights.flatten(0, 1).mT, hs.flatten(0, 1)).view(*hs.shape[:2], -1)


def _output(part: _Given, hs: Tensor) -> Tensor:
    """What comes before the gate, (t, p, d)."""
    y = _over_state(hs, part.C)
    return y if part.D is None else y.addcmul_(part.u, part.D)


def _add(total: Tensor, first: int, shares: Tensor) -> None:
    """Add shares (t, p, s, d) to the gradient of weights, (n, p, s, 1) or (p, s, d)."""
    if total.ndim == 4:
        torch.sum(shares, 3, keepdim=True, out=total[first : first + len(shares)])
    else:
        total += shares.sum(0)
