"""A few windows at a time, so that logits never leave the cache; the backward computes them anew.

Which windows, `plan.py` says. Registered as `zoo::window_attention`, so that torch.compile sees one node and autograd
keeps nothing but the inputs.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.impls import eager

from .plan import Block, Span, blocks

# Logits in work at once. CPU: buffers of 1 MiB in float32, the best by a little for windows of 8 and of 16 a side;
# smaller ones pay for calls, larger ones leave the caches. Elsewhere launches cost more than memory traffic.
_CPU_LOGITS, _OTHER_LOGITS = 2**18, 2**25


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
        rows = bias_index.flatten().remainder(len(bias_table))
        table = bias_table.to(_wide(q.dtype)).t().contiguous()  # heads rows: gathers along one head are the fastest
        keys = [size + 2 * more for size, more in zip(window, overlap, strict=True)]
        bias = table.index_select(1, rows).unflatten(1, (*window, *keys))  # heads wh ww kh kw
    if order is not None:
        order = order.expand(q.shape[:3])[..., None]  # b heads n 1
        q, k, v = (t.gather(2, order.expand(t.shape)) for t in (q, k, v))
    attention = _attention if eager(q, k, v, bias) else _window_attention
    out = attention(q, k, v, bias, grid, window, dilation, shift, overlap, wrap, pad == "attend", scale)
    return out if order is None else torch.zeros_like(out).scatter(2, order.expand(out.shape), out)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    dilation: Sequence[int],
    shift: Sequence[int],
    overlap: Sequence[int],
    wrap: bool,
    attend: bool,
    scale: float,
) -> Tensor:
    q, k, v = (_to_map(t, grid) for t in (q, k, v))
    out = torch.empty_like(v, memory_format=torch.contiguous_format)  # b h w heads e
    space = _Space(q)
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(q, bias, _limit(q), grid, window, dilation, shift, overlap, wrap, attend):
            qs = _gather(q, block, block.queries, dilation, space)
            ks, vs = (_gather(t, block, block.keys, dilation, space) for t in (k, v))
            ys = _room(vs, qs.shape[1], space)
            logits = space.take(len(qs) * block.heads, qs.shape[1], ks.shape[1])
            for bh, yh, qh, kh, vh in _by_heads(block, ys, qs, ks, vs):
                ph = _attend(qh, kh, bh, scale, logits[: len(qh)])
                torch.bmm(vh.mT, ph.mT, out=yh.mT)
            _scatter(out, ys, block, block.queries, dilation)
            space.release()
    return _to_tokens(out)


_window_attention = torch.library.custom_op("zoo::window_attention", _attention, mutates_args=())


@_window_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    return v.new_empty(v.transpose(1, 2).shape).transpose(1, 2)


@torch.library.custom_op("zoo::window_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    dilation: Sequence[int],
    shift: Sequence[int],
    overlap: Sequence[int],
    wrap: bool,
    attend: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dout, q, k, v = (_to_map(t, grid) for t in (dout, q, k, v))
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if any(overlap):  # a key's gradient is then a sum over windows
        dk, dv = (torch.zeros_like(t, dtype=_wide(t.dtype)) for t in (dk, dv))
    dbias = q.new_empty(0) if bias is None else torch.zeros_like(bias)
    space = _Space(q)
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(q, bias, _limit(q), grid, window, dilation, shift, overlap, wrap, attend):
            qs, dos = (_gather(t, block, block.queries, dilation, space) for t in (q, dout))
            ks, vs = (_gather(t, block, block.keys, dilation, space) for t in (k, v))
            dqs, dks, dvs = (_room(t, t.shape[1], space) for t in (qs, ks, vs))
            logits, dp = (space.take(len(qs) * block.heads, qs.shape[1], ks.shape[1]) for _ in range(2))
            for i, (bh, dqh, dkh, dvh, qh, kh, vh, doh) in enumerate(_by_heads(block, dqs, dks, dvs, qs, ks, vs, dos)):
                ph = _attend(qh, kh, bh, scale, logits[: len(qh)])
                torch.bmm(doh.mT, ph, out=dvh.mT)
                ds = torch.bmm(doh, vh.mT, out=dp[: len(qh)])
                torch.ops.aten._softmax_backward_data.out(ds, ph, -1, ph.dtype, grad_input=ds)
                torch.baddbmm(dqh.mT, kh.mT, ds.mT, beta=0, alpha=scale, out=dqh.mT)
                torch.baddbmm(dkh.mT, qh.mT, ds, beta=0, alpha=scale, out=dkh.mT)
                if bias is not None:
                    part = dbias[(slice(i * block.heads, (i + 1) * block.heads), *block.place)]
                    part += ds.view(len(part), -1, *part.shape[1:]).sum(1)
            _scatter(dq, dqs, block, block.queries, dilation)
            _scatter(dk, dks, block, block.keys, dilation, add=any(overlap))
            _scatter(dv, dvs, block, block.keys, dilation, add=any(overlap))
            space.release()
    return _to_tokens(dq), _to_tokens(dk.to(k.dtype)), _to_tokens(dv.to(v.dtype)), dbias


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.transpose(1, 2).shape).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if bias is None else torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
    q, k, v, bias, *ctx.geometry = inputs
    ctx.save_for_backward(q, k, v, bias)


def _grad(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    q, k, v, bias = ctx.saved_tensors
    dq, dk, dv, dbias = _backward(dout, q, k, v, bias, *ctx.geometry)
    return dq, dk, dv, None if bias is None else dbias, *[None] * len(ctx.geometry)


_window_attention.register_autograd(_grad, setup_context=_save)


def _limit(x: Tensor) -> int:
    return _CPU_LOGITS if x.device.type == "cpu" else _OTHER_LOGITS


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _to_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    return x.transpose(1, 2).unflatten(1, grid)  # b h w heads d


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(1, 2).transpose(1, 2)  # b heads n d


def _by_heads(block: Block, *windows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some heads at a time: their biases, heads n m, then their part of each of `windows`, (heads nw) n d."""
    parts = [t.permute(2, 0, 1, 3).split(block.heads) for t in windows]  # heads nw n d each
    for bias, *own in zip(block.bias.split(block.heads), *parts, strict=True):
        yield bias, *(t.flatten(0, 1) for t in own)


def _attend(q: Tensor, k: Tensor, bias: Tensor, scale: float, logits: Tensor) -> Tensor:
    """Write the probabilities, (heads nw) n m, over the logits."""
    if len(bias) == 1:
        torch.baddbmm(bias, q, k.mT, alpha=scale, out=logits)
    else:  # each for all windows of its head
        torch.baddbmm(logits, q, k.mT, beta=0, alpha=scale, out=logits)
        logits.unflatten(0, (len(bias), -1)).add_(bias[:, None])
    return torch.softmax(logits, -1, out=logits)


class _Space:
    """Buffers in float32 or wider that every block takes in the same order: fresh memory costs page faults."""

    def __init__(self, like: Tensor) -> None:
        self._options = {"dtype": _wide(like.dtype), "device": like.device}
        self._buffers: list[Tensor] = []
        self._taken = 0

    def take(self, *shape: int) -> Tensor:
        size = 1
        for length in shape:
            size *= length
        if self._taken == len(self._buffers):
            self._buffers.append(torch.empty(size, **self._options))
        elif self._buffers[self._taken].numel() < size:
            self._buffers[self._taken] = torch.empty(size, **self._options)
        self._taken += 1
        return self._buffers[self._taken - 1][:size].view(shape)

    def release(self) -> None:
        self._taken = 0


def _room(like: Tensor, n: int, space: _Space) -> Tensor:
    """For results of shape (nw, n, heads, d) that lie d by n: BLAS is up to five times slower at rows only d wide."""
    nw, _, heads, d = like.shape
    return space.take(heads, nw, d, n).permute(1, 3, 0, 2)


def _places(
    x: Tensor, windows: Tensor, block: Block, spans: tuple[Span, Span], apart: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the map and of the windows that hold the same tokens, (b, ny, nx, wh, ww, heads, d)."""
    (first, images), (down, right), (along_b, along_h, along_w, *inner) = block.images, block.steps, x.stride()
    for (at_y, y, rows), (at_x, x0, columns) in product(spans[0].pieces, spans[1].pieces):
        view = x.as_strided(
            (images, *block.counts, rows, columns, *x.shape[3:]),
            (along_b, along_h * down, along_w * right, along_h * apart[0], along_w * apart[1], *inner),
            x.storage_offset() + first * along_b + y * along_h + x0 * along_w,
        )
        whole = (rows, columns) == windows.shape[3:5]
        yield view, windows if whole else windows.narrow(3, at_y, rows).narrow(4, at_x, columns)


def _gather(x: Tensor, block: Block, spans: tuple[Span, Span], apart: Sequence[int], space: _Space) -> Tensor:
    """Tokens of the windows, (nw, n, heads, d); padding is zero."""
    windows = space.take(block.images[1], *block.counts, spans[0].size, spans[1].size, *x.shape[3:])
    if any(sum(length for _, _, length in span.pieces) < span.size for span in spans):
        windows.zero_()
    for view, part in _places(x, windows, block, spans, apart):
        part.copy_(view)
    return windows.flatten(3, 4).flatten(0, 2)


def _scatter(
    x: Tensor, windows: Tensor, block: Block, spans: tuple[Span, Span], apart: Sequence[int], add: bool = False
) -> None:
    """Write the windows (nw, n, heads, d) to their places in the map, or add them to what is there."""
    windows = windows.unflatten(1, (spans[0].size, spans[1].size)).unflatten(0, (block.images[1], *block.counts))
    turns = [-(-span.size * a // s) for span, a, s in zip(spans, apart, block.steps, strict=True)]
    for view, part in _places(x, windows, block, spans, apart):
        if not add:
            view.copy_(part)
            continue
        for i, j in product(*map(range, turns)):  # windows so far apart do not overlap
            view[:, i :: turns[0], j :: turns[1]] += part[:, i :: turns[0], j :: turns[1]]
