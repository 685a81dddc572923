"""Chunks of tokens: pairs of tokens inside of one, a state between them; the backward computes both anew.

A chunk is a power of two of blocks. Its pairs are the lower left quarter of a square (queries of the second half, keys
of the first), then the two halves likewise, down to a block. The decay between such a pair is that from the middle to
the query times that from the key to the middle, two numbers up to 1. So the product over channels is a product of
matrices however strong the decay is; nothing is divided, and no two long sums are subtracted from each other.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .decay import by_block

_CHUNK = 64  # tokens at most, or one block where it is longer
_NUMBERS = 2**17  # of each tensor in work at once: 512 KiB in float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, block: int, initial_state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    g = None if log_decay is None else by_block(log_decay, block, _wide(q))
    return _causal(q, k, v, g, initial_state, block, dtype)


@torch.library.custom_op("zoo::causal_linear_attention_torch", mutates_args=())
def _causal(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out, state = _empty_out(v, dtype), torch.empty_like(initial_state, dtype=_wide(q))
    with torch.autocast(q.device.type, enabled=False):
        for i in range(len(q)):
            s = initial_state[i].to(state.dtype)  # heads d e
            for span in _spans(q, block):
                qc, kc, vc = (_chunks(t, i, span, block) for t in (q, k, v))  # heads chunks c d
                gc = None if g is None else _chunks(g, i, span, block)
                before, after, s = _carry(kc, vc, gc, s)
                if qc.shape[2] == block:
                    y = qc @ after
                else:
                    y = (_pairs(qc, kc, gc, block) @ vc).add_(_times(qc, _decay_to(gc)) @ before)
                out[i, :, span] = _tokens(y, span)
            state[i] = s
    return out, state


@_causal.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, initial_state: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _empty_out(v, dtype), torch.empty_like(initial_state, dtype=_wide(q))


@torch.library.custom_op("zoo::causal_linear_attention_torch_backward", mutates_args=())
def _causal_backward(
    dout: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dinitial = (torch.empty_like(t) for t in (q, k, v, initial_state))
    dg = q.new_empty(0) if g is None else torch.empty_like(g)
    with torch.autocast(q.device.type, enabled=False):
        for i in range(len(q)):
            s, ds, kept = initial_state[i].to(_wide(q)), dstate[i], []
            for span in _spans(q, block):
                kc, vc = (_chunks(t, i, span, block) for t in (k, v))
                gc = None if g is None else _chunks(g, i, span, block)
                before, after, s = _carry(kc, vc, gc, s)
                kept.append((span, gc, before, after))
            for span, gc, before, after in reversed(kept):
                qc, kc, vc, dy = (_chunks(t, i, span, block) for t in (q, k, v, dout))
                backward = _one_block if qc.shape[2] == block else _many_blocks
                *grads, dgc, ds = backward(dy, qc, kc, vc, gc, before, after, ds, block)
                for grad, part in zip((dq, dk, dv), grads, strict=True):
                    grad[i, :, span] = _tokens(part, span)
                if dgc is not None:
                    dg[i, :, span] = _tokens(dgc, span)
            dinitial[i] = ds
    return dq, dk, dv, dg, dinitial


@_causal_backward.register_fake
def _(
    dout: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    initial_state: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dinitial = (torch.empty_like(t) for t in (q, k, v, initial_state))
    return dq, dk, dv, q.new_empty(0) if g is None else torch.empty_like(g), dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    *tensors, ctx.block, _ = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dout: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    g = ctx.saved_tensors[3]
    dq, dk, dv, dg, dinitial = _causal_backward(dout, dstate, *ctx.saved_tensors, ctx.block)
    return dq, dk, dv, None if g is None else dg, dinitial, None, None


_causal.register_autograd(_grad, setup_context=_save)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_out(v: Tensor, dtype: torch.dtype) -> Tensor:
    """Heads next to the features, as the projection after the attention wants them."""
    return v.new_empty(v.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)


def _chunk(block: int) -> int:
    """The most blocks that fit into `_CHUNK`, a power of two of them, in tokens."""
    while block * 2 <= _CHUNK:
        block *= 2
    return block


def _spans(q: Tensor, block: int) -> list[slice]:
    """Tokens that are worked on together, whole chunks of them."""
    _, heads, n, d = q.shape
    chunk = _chunk(block)
    step = chunk * max(1, _NUMBERS // max(1, heads * d * chunk)) if q.device.type == "cpu" else max(1, n)
    return [slice(at, min(at + step, n)) for at in range(0, n, step)]


def _chunks(x: Tensor, sample: int, span: slice, block: int) -> Tensor:
    """Some tokens in float32 or wider, (heads, chunks, c, d); zeros fill the last chunk."""
    chunk = _chunk(block)
    some = x[sample, :, span].to(_wide(x))
    some = F.pad(some, (0, 0, 0, -some.shape[1] % chunk)) if some.shape[1] % chunk else some
    return some.unflatten(1, (-1, chunk))


def _tokens(x: Tensor, span: slice) -> Tensor:
    return x.flatten(1, 2)[:, : span.stop - span.start]


def _up_to(x: Tensor) -> Tensor:
    return x.cumsum(-2)


def _before(x: Tensor) -> Tensor:
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _from(x: Tensor) -> Tensor:
    return x.flip(-2).cumsum(-2).flip(-2)


def _after(x: Tensor) -> Tensor:
    return _from(F.pad(x[..., 1:, :], (0, 0, 0, 1)))


def _decay_to(g: Tensor | None) -> Tensor | None:
    """Decay from before the chunk to each token."""
    return None if g is None else _up_to(g).exp_()


def _decay_from(g: Tensor | None) -> Tensor | None:
    """Decay from each token to the end of the chunk."""
    return None if g is None else _after(g).exp_()


def _times(x: Tensor, decay: Tensor | None) -> Tensor:
    return x if decay is None else x * decay


def _carry(k: Tensor, v: Tensor, g: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The states before and after each chunk, (heads, chunks, d, e), and the last one."""
    after = _times(k, _decay_from(g)).mT @ v
    before = torch.empty_like(after)
    whole = None if g is None else g.sum(2).exp_()[..., None]  # heads chunks d 1
    for c in range(k.shape[1]):
        before[:, c] = state
        after[:, c] += state if whole is None else whole[:, c] * state
        state = after[:, c]
    return before, after, state


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and second `size` tokens of each 2 `size`, (heads, chunks, pieces, size, d)."""
    first, second = x.unflatten(2, (-1, 2, size)).unbind(3)
    return first, second


def _quarters(pairs: Tensor, size: int) -> Tensor:
    """View of `pairs` at queries in second halves and keys in the first ones, (heads, chunks, pieces, size, size)."""
    view = pairs.unflatten(3, (-1, 2, size)).unflatten(2, (-1, 2, size))[:, :, :, 1, :, :, 0]
    return view.diagonal(0, 2, 4).movedim(-1, 2)


def _own_blocks(pairs: Tensor, block: int) -> Tensor:
    """View of `pairs` inside of blocks, (heads, chunks, blocks, block, block)."""
    return pairs.unflatten(3, (-1, block)).unflatten(2, (-1, block)).diagonal(0, 2, 4).movedim(-1, 2)


def _levels(g: Tensor, block: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Half size, decay from the middle to the queries, decay from the keys to the middle."""
    size = block
    while size < g.shape[2]:
        first, second = _halves(g, size)
        yield size, _up_to(second).exp_(), _after(first).exp_()
        size *= 2


def _decays(q: Tensor, g: Tensor | None, block: int) -> Tensor:
    """Decay from key to query where it is one for all channels, (heads, chunks, c, c) or (c, c); 0 where not seen."""
    c = q.shape[2]
    if g is None:
        of = torch.arange(c, device=q.device) // block
        return (of[:, None] >= of).to(q.dtype)
    decays = q.new_zeros(*q.shape[:3], c)
    _own_blocks(decays, block).fill_(1)
    for size, to_query, from_key in _levels(g, block):
        _quarters(decays, size).copy_(to_query * from_key.mT)
    return decays


def _pairs(q: Tensor, k: Tensor, g: Tensor | None, block: int) -> Tensor:
    """Weights of values inside of chunks, (heads, chunks, c, c)."""
    if g is None or g.shape[3] == 1:
        return (q @ k.mT).mul_(_decays(q, g, block))
    pairs = q.new_zeros(*q.shape[:3], q.shape[2])
    qb, kb = (t.unflatten(2, (-1, block)) for t in (q, k))
    _own_blocks(pairs, block).copy_(qb @ kb.mT)
    for size, to_query, from_key in _levels(g, block):
        _quarters(pairs, size).copy_((_halves(q, size)[1] * to_query) @ (_halves(k, size)[0] * from_key).mT)
    return pairs


def _pairs_backward(
    dpairs: Tensor, q: Tensor, k: Tensor, g: Tensor | None, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The weights once more, and gradients of queries, keys and decays."""
    pairs = _pairs(q, k, g, block)
    if g is None or g.shape[3] == 1:
        dproducts = dpairs * _decays(q, g, block)
        dq, dk = dproducts @ k, dproducts.mT @ q
    else:
        qb, kb = (t.unflatten(2, (-1, block)) for t in (q, k))
        own = _own_blocks(dpairs, block)
        dq, dk = (own @ kb).flatten(2, 3), (own.mT @ qb).flatten(2, 3)
    if g is None:
        return pairs, dq, dk, None
    dg = torch.zeros_like(g)
    for size, to_query, from_key in _levels(g, block):
        if g.shape[3] == 1:
            both = _quarters(dpairs, size) * _quarters(pairs, size)
            of_queries, of_keys = both.sum(-1, keepdim=True), both.sum(-2)[..., None]
        else:
            qs, ks, dquarters = _halves(q, size)[1], _halves(k, size)[0], _quarters(dpairs, size)
            dqs = (dquarters @ (ks * from_key)).mul_(to_query)
            dks = (dquarters.mT @ (qs * to_query)).mul_(from_key)
            _halves(dq, size)[1].add_(dqs)
            _halves(dk, size)[0].add_(dks)
            of_queries, of_keys = dqs.mul_(qs), dks.mul_(ks)
        dfirst, dsecond = _halves(dg, size)
        dsecond += _from(of_queries)
        dfirst += _before(of_keys)
    return pairs, dq, dk, dg


def _carry_backward(dread: Tensor, g: Tensor | None, ds: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the states after each chunk, and of the state before all.

    Args:
        dread: gradients of the states that queries read.
        g: logarithms of the decay.
        ds: gradient of the last state.
        own: whether queries read the state after their chunk, not the one before.
    """
    dafter = torch.empty_like(dread)
    whole = None if g is None else g.sum(2).exp_()[..., None]  # heads chunks d 1
    for c in reversed(range(dread.shape[1])):
        dafter[:, c] = ds + dread[:, c] if own else ds
        ds = dafter[:, c] if whole is None else whole[:, c] * dafter[:, c]
        ds = ds if own else ds + dread[:, c]
    return dafter, ds


def _dwhole(g: Tensor, before: Tensor, dafter: Tensor) -> Tensor:
    """Gradient of the decay over whole chunks, for each of its tokens; (heads, chunks, 1, d or 1)."""
    both = g.sum(2).exp_() * (before * dafter).sum(-1)
    return both[:, :, None] if g.shape[3] > 1 else both.sum(-1, keepdim=True)[:, :, None]


def _one_block(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor,
    after: Tensor,
    ds: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    dafter, ds = _carry_backward(q.mT @ dy, g, ds, own=True)
    dg = None if g is None else _dwhole(g, before, dafter).expand_as(g)
    return dy @ after.mT, v @ dafter.mT, k @ dafter, dg, ds


def _many_blocks(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor,
    after: Tensor,
    ds: Tensor,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    to_query, from_key = _decay_to(g), _decay_from(g)
    dafter, ds = _carry_backward(_times(q, to_query).mT @ dy, g, ds, own=False)
    pairs, dq, dk, dg = _pairs_backward(dy @ v.mT, q, k, g, block)
    dv = (pairs.mT @ dy).add_(_times(k, from_key) @ dafter)
    dqs, dks = _times(dy @ before.mT, to_query), _times(v @ dafter.mT, from_key)
    if g is not None and dg is not None:
        of_queries, of_keys = (t if g.shape[3] > 1 else t.sum(-1, keepdim=True) for t in (q * dqs, k * dks))
        dg += _from(of_queries) + _before(of_keys) + _dwhole(g, before, dafter)
    return dq.add_(dqs), dk.add_(dks), dv, dg, ds
