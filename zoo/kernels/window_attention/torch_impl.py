"""A few windows at a time, so that logits never leave the cache; the backward computes them anew.

Nothing is rolled, padded or masked: windows that lie alike in the map are one strided view of it, and a window that the
border of the map cuts in parts that do not see each other is worked on part by part. Registered as
`zoo::window_attention`, so that torch.compile sees one node and autograd keeps nothing but the inputs.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits in work at once. CPU: buffers of 1 MiB in float32, the best by a little for windows of 8 and of 16 a side;
# smaller ones pay for calls, larger ones leave the caches. Elsewhere launches cost more than memory traffic.
_CPU_LOGITS, _OTHER_LOGITS = 2**18, 2**25


class _Span(NamedTuple):
    """Neighbouring tokens of a window along one axis: `first` counts from the corner of the window.

    A piece (at, start, length) says that the tokens from `at` on of the span are those from `start` on of the map. What
    no piece covers is padding.
    """

    first: int
    size: int
    pieces: tuple[tuple[int, int, int], ...]


class _Run(NamedTuple):
    """The same part of `count` neighbouring windows along one axis."""

    count: int
    queries: _Span
    keys: _Span
    visible: tuple[bool, ...]  # which of the keys


class _Block(NamedTuple):
    """Windows worked on together: some images, and `counts` of rows and columns of windows."""

    images: tuple[int, int]
    counts: tuple[int, int]
    queries: tuple[_Span, _Span]
    keys: tuple[_Span, _Span]
    heads: int  # at a time
    bias: Tensor  # heads n m, or broadcast to it
    place: tuple[slice, ...]  # of the biases in (heads, wh, ww, kh, kw)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    overlap: tuple[int, int],
    wrap: bool,
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
    return _window_attention(q, k, v, bias, grid, window, shift, overlap, wrap, pad == "attend", scale)


@torch.library.custom_op("zoo::window_attention", mutates_args=())
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
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
        for block in _blocks(q, bias, grid, window, shift, overlap, wrap, attend):
            qs = _gather(q, block, block.queries, window, space)
            ks, vs = (_gather(t, block, block.keys, window, space) for t in (k, v))
            ys = space.take(*qs.shape[:3], vs.shape[3])
            logits, p = (space.take(len(qs) * block.heads, qs.shape[1], ks.shape[1]) for _ in range(2))
            for bh, yh, *parts in _by_heads(block, ys, qs, ks, vs):
                qh, kh, vh = (t.flatten(0, 1) for t in parts)  # (heads nw) n d
                ph = _attend(qh, kh, bh, scale, logits[: len(qh)], p[: len(qh)])
                # d by n, not n by d: BLAS is up to five times slower at a result only d wide.
                yh.copy_(torch.bmm(vh.mT, ph.mT).mT.view_as(yh))
            _scatter(out, ys, block, block.queries, window)
            space.release()
    return _to_tokens(out)


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
        for block in _blocks(q, bias, grid, window, shift, overlap, wrap, attend):
            qs, dos = (_gather(t, block, block.queries, window, space) for t in (q, dout))
            ks, vs = (_gather(t, block, block.keys, window, space) for t in (k, v))
            dqs, dks, dvs = (space.take(*t.shape) for t in (qs, ks, vs))
            logits, p, dp = (space.take(len(qs) * block.heads, qs.shape[1], ks.shape[1]) for _ in range(3))
            for i, (bh, dqh, dkh, dvh, *parts) in enumerate(_by_heads(block, dqs, dks, dvs, qs, ks, vs, dos)):
                qh, kh, vh, doh = (t.flatten(0, 1) for t in parts)  # (heads nw) n d
                ph = _attend(qh, kh, bh, scale, logits[: len(qh)], p[: len(qh)])
                dph = torch.bmm(doh, vh.mT, out=dp[: len(qh)])
                ds = torch.ops.aten._softmax_backward_data.out(dph, ph, -1, p.dtype, grad_input=logits[: len(qh)])
                dvh.copy_(torch.bmm(doh.mT, ph).mT.view_as(dvh))
                torch.mul(torch.bmm(kh.mT, ds.mT).mT.view_as(dqh), scale, out=dqh)
                torch.mul(torch.bmm(qh.mT, ds).mT.view_as(dkh), scale, out=dkh)
                if bias is not None:
                    part = dbias[(slice(i * block.heads, (i + 1) * block.heads), *block.place)]
                    part += ds.view(len(part), len(qs), -1).sum(1).view(part.shape)
            _scatter(dq, dqs, block, block.queries, window)
            _scatter(dk, dks, block, block.keys, window, add=any(overlap))
            _scatter(dv, dvs, block, block.keys, window, add=any(overlap))
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _to_map(x: Tensor, grid: Sequence[int]) -> Tensor:
    return x.transpose(1, 2).unflatten(1, grid)  # b h w heads d


def _to_tokens(x: Tensor) -> Tensor:
    return x.flatten(1, 2).transpose(1, 2)  # b heads n d


def _by_heads(block: _Block, *windows: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of some heads at a time: their biases (heads nw) n m, then each of `windows` as heads nw n d."""
    shares = [t.permute(2, 0, 1, 3).split(block.heads) for t in windows]  # heads nw n d each
    for bias, *parts in zip(block.bias.split(block.heads), *shares, strict=True):
        yield bias[:, None].expand(-1, parts[0].shape[1], -1, -1).flatten(0, 1), *parts


def _attend(q: Tensor, k: Tensor, bias: Tensor, scale: float, logits: Tensor, p: Tensor) -> Tensor:
    """Write the probabilities, (heads nw) n m, to `p`."""
    torch.baddbmm(bias, q, k.mT, alpha=scale, out=logits)
    return torch.softmax(logits, -1, out=p)


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


def _blocks(
    q: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    overlap: Sequence[int],
    wrap: bool,
    attend: bool,
) -> Iterator[_Block]:
    """Cut the map `q`, (b, h, w, heads, d), into blocks of a bounded number of logits per head."""
    b, heads = q.shape[0], q.shape[3]
    limit = _CPU_LOGITS if q.device.type == "cpu" else _OTHER_LOGITS
    axes = [_runs(grid[i], window[i], shift[i], overlap[i], wrap, attend) for i in range(2)] if q.numel() else [(), ()]
    none = torch.zeros(1, 1, 1, dtype=_wide(q.dtype), device=q.device)
    for rows, columns in product(*axes):
        queries, keys = (rows.queries, columns.queries), (rows.keys, columns.keys)
        place = tuple(slice(span.first, span.first + span.size) for span in (*queries, *keys))
        part = none if bias is None else bias[(slice(None), *place)].flatten(1, 2).flatten(2, 3)  # heads n m
        if not all((*rows.visible, *columns.visible)):
            hidden = ~(torch.tensor(rows.visible)[:, None] & torch.tensor(columns.visible)).flatten()  # m
            part = part.masked_fill(hidden.to(q.device), -torch.inf)
        part = part.expand(heads, -1, -1)
        most = limit // (queries[0].size * queries[1].size * keys[0].size * keys[1].size)
        # Whole rows of windows, whole images of them, as far as they fit.
        wide = _share(columns.count, most)
        high = _share(rows.count, most // columns.count)
        deep = _share(b, most // (columns.count * rows.count))
        together = _share(heads, most // (wide * high * deep))
        for image, top, left in product(range(0, b, deep), range(0, rows.count, high), range(0, columns.count, wide)):
            counts = min(high, rows.count - top), min(wide, columns.count - left)
            by = top * window[0], left * window[1]
            inside, seen = ((_moved(rows_, by[0]), _moved(columns_, by[1])) for rows_, columns_ in (queries, keys))
            yield _Block((image, min(deep, b - image)), counts, inside, seen, together, part, place)


def _share(count: int, most: int) -> int:
    """The size of equal shares of `count` things, at most `most` each and at least one."""
    return -(-count // -(-count // max(1, most)))


def _moved(span: _Span, by: int) -> _Span:
    return span._replace(pieces=tuple((at, start + by, length) for at, start, length in span.pieces))


@lru_cache(maxsize=64)
def _runs(n: int, window: int, shift: int, overlap: int, wrap: bool, attend: bool) -> tuple[_Run, ...]:
    """The parts of windows along an axis of `n` tokens that hold queries, neighbours that lie alike in one."""
    size = -(-n // window) * window
    runs: list[_Run] = []
    for corner in range(shift, size + shift, window):
        queries = range(corner, corner + window)
        keys = range(corner - overlap, corner + window + overlap)
        for part in _parts(n, size if shift else None, queries, keys, wrap, attend):
            count = runs[-1].count if runs else 0
            if runs and part == runs[-1]._replace(
                count=1, queries=_moved(runs[-1].queries, count * window), keys=_moved(runs[-1].keys, count * window)
            ):
                runs[-1] = runs[-1]._replace(count=count + 1)
            else:
                runs.append(part)
    return tuple(runs)


def _parts(n: int, size: int | None, queries: range, keys: range, wrap: bool, attend: bool) -> Iterator[_Run]:
    """Split one window where its tokens do not see each other; `size` is the length at which the axis goes around."""

    def token(i: int) -> int:
        return i if size is None or i < size else i - size

    def real(i: int) -> bool:
        return 0 <= token(i) < n

    for around in (False,) if wrap or size is None else (False, True):
        if wrap or size is None:
            inside, seen = queries, keys
        else:
            inside, seen = ([i for i in span if (i >= size) == around] for span in (queries, keys))
        inside = [i for i in inside if real(i)]
        seen = [i for i in seen if attend or real(i)]
        if not inside:
            continue
        # A window that wraps may hold padding between its tokens; elsewhere nothing hidden is left in the spans.
        inside, seen = range(inside[0], inside[-1] + 1), range(seen[0], seen[-1] + 1)
        yield _Run(
            1,
            _Span(inside[0] - queries[0], len(inside), _pieces([token(i) for i in inside], n)),
            _Span(seen[0] - keys[0], len(seen), _pieces([token(i) for i in seen], n)),
            tuple(attend or real(j) for j in seen),
        )


def _pieces(tokens: list[int], n: int) -> tuple[tuple[int, int, int], ...]:
    """Stretches of consecutive tokens of the map."""
    found: list[tuple[int, int, int]] = []
    for at, token in enumerate(tokens):
        if not 0 <= token < n:
            continue
        if found and (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]) == (at, token):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((at, token, 1))
    return tuple(found)


def _places(
    x: Tensor, windows: Tensor, block: _Block, spans: tuple[_Span, _Span], step: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the map and of the windows that hold the same tokens, (b, ny, nx, wh, ww, heads, d)."""
    (first, images), (along_b, along_h, along_w, *inner) = block.images, x.stride()
    for (at_y, y, rows), (at_x, x0, columns) in product(spans[0].pieces, spans[1].pieces):
        view = x.as_strided(
            (images, *block.counts, rows, columns, *x.shape[3:]),
            (along_b, along_h * step[0], along_w * step[1], along_h, along_w, *inner),
            x.storage_offset() + first * along_b + y * along_h + x0 * along_w,
        )
        whole = (rows, columns) == windows.shape[3:5]
        yield view, windows if whole else windows.narrow(3, at_y, rows).narrow(4, at_x, columns)


def _gather(x: Tensor, block: _Block, spans: tuple[_Span, _Span], step: Sequence[int], space: _Space) -> Tensor:
    """Tokens of the windows, (nw, n, heads, d); padding is zero."""
    windows = space.take(block.images[1], *block.counts, spans[0].size, spans[1].size, *x.shape[3:])
    if any(sum(length for _, _, length in span.pieces) < span.size for span in spans):
        windows.zero_()
    for view, part in _places(x, windows, block, spans, step):
        part.copy_(view)
    return windows.flatten(3, 4).flatten(0, 2)


def _scatter(
    x: Tensor, windows: Tensor, block: _Block, spans: tuple[_Span, _Span], step: Sequence[int], add: bool = False
) -> None:
    """Write the windows (nw, n, heads, d) to their places in the map, or add them to what is there."""
    shape = (block.images[1], *block.counts, spans[0].size, spans[1].size, *x.shape[3:])
    apart = [-(-span.size // s) for span, s in zip(spans, step, strict=True)]
    for view, part in _places(x, windows.view(shape), block, spans, step):
        if not add:
            view.copy_(part)
            continue
        for i, j in product(range(apart[0]), range(apart[1])):  # windows so far apart do not overlap
            view[:, i :: apart[0], j :: apart[1]] += part[:, i :: apart[0], j :: apart[1]]
