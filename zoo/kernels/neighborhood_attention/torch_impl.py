"""A few tiles of queries at a time, against the gathered union of their windows; the backward computes logits anew.

Tiles whose windows lie alike share one small mask and one list of offsets. Keys that no query of a tile sees, such as
the corners around a circle, are not gathered. Registered as `zoo::neighborhood_attention`, so that torch.compile sees
one node and autograd keeps nothing but the inputs.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .plan import Geometry, Run, pairs, runs, tokens

# Logits in work at once. CPU: 4 MiB in float32, the fastest of 1 to 16. Elsewhere launches cost more than traffic.
_CPU_LOGITS, _OTHER_LOGITS = 2**20, 2**25
# Queries of a tile along each axis: larger ones gather less, smaller ones compute fewer logits in vain.
_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


class _Block(NamedTuple):
    """Tiles that lie alike, of some images and heads."""

    images: slice
    heads: slice
    queries: Tensor  # nt n: tokens of each tile
    keys: Tensor  # nt m, the extra ones last
    mask: Tensor  # heads n m, or 1 n m without bias: what is added to logits, -inf where nothing is seen
    row: Tensor  # n m, without extra keys: of the bias table


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
    table = None if bias is None else bias.flatten(1).to(_wide(q.dtype))  # heads rows
    return _neighborhood_attention(q, k, v, extra_k, extra_v, table, geometry.pack(), scale)


@torch.library.custom_op("zoo::neighborhood_attention", mutates_args=())
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
    out, lse = torch.empty_like(v), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))
    q, k, v = _whole(q), _whole(k, extra_k), _whole(v, extra_v)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, k, table, geometry):
            qs, ks, vs = _take(q, block, block.queries), _take(k, block, block.keys), _take(v, block, block.keys)
            y, norm = _attend(qs, ks, vs, block, scale)
            _put(out, block, y)
            _put(lse, block, norm)
    return out, lse


@_neighborhood_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[:3], dtype=_wide(q.dtype))


@torch.library.custom_op("zoo::neighborhood_attention_backward", mutates_args=())
def _backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    table: Tensor | None,
    geometry: list[int],
    scale: float,
) -> list[Tensor]:
    inputs, n = [q, k, v, extra_k, extra_v, table], q.shape[2]
    dout = _whole(torch.zeros_like(v) if dout is None else dout)
    q, k, v = _whole(q), _whole(k, extra_k), _whole(v, extra_v)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    dtable = None if table is None else torch.zeros_like(table)
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, k, table, geometry):
            qs, ks, vs = _take(q, block, block.queries), _take(k, block, block.keys), _take(v, block, block.keys)
            dos = _take(dout, block, block.queries)
            logits, p = _softmax(qs, ks, block, scale)
            dp = torch.bmm(dos, vs.mT)
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=logits)
            if dlse is not None:
                ds.addcmul_(p, _take(dlse[..., None], block, block.queries))
            # d by n, not n by d: BLAS is up to five times slower at a result only d wide.
            _put(dq, block, torch.bmm(ks.mT, ds.mT).mT.mul_(scale))
            _add(dk, block, torch.bmm(qs.mT, ds).mT.mul_(scale))
            _add(dv, block, torch.bmm(dos.mT, p).mT)
            if dtable is not None:
                share = ds[..., : block.row.shape[1]].unflatten(0, _counts(q, block))  # b heads nt n m
                dtable[block.heads].index_add_(1, block.row.flatten(), share.sum((0, 2)).flatten(1))
    gradients = (dq, dk[:, :, :n], dv[:, :, :n], dk[:, :, n:], dv[:, :, n:], dtable)
    return [
        d.to(t.dtype, copy=True, memory_format=torch.contiguous_format)  # no views of each other
        for d, t in zip(gradients, inputs, strict=True)
        if d is not None and t is not None
    ]


@_backward.register_fake
def _(dout: Tensor | None, dlse: Tensor | None, *inputs: Any) -> list[Tensor]:  # noqa: ANN401
    return [t.new_empty(t.shape) for t in inputs[:6] if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    inputs = ctx.saved_tensors
    found = iter(_backward(dout, dlse, *inputs, ctx.geometry, ctx.scale))
    return *(None if t is None else next(found) for t in inputs), None, None


_neighborhood_attention.register_autograd(_grad, setup_context=_save)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _whole(x: Tensor, extra: Tensor | None = None) -> Tensor:
    """In float32 or wider, a head in one piece: each token is gathered several times, from afar three times slower."""
    return (x if extra is None else torch.cat([x, extra], 2)).to(_wide(x.dtype)).contiguous()


def _blocks(q: Tensor, k: Tensor, table: Tensor | None, numbers: list[int]) -> Iterator[_Block]:
    """Cut the work into blocks of a bounded number of logits, as far as a single tile allows."""
    geometry, (b, heads, n, _) = Geometry.unpack(numbers), q.shape
    limit = _CPU_LOGITS if q.device.type == "cpu" else _OTHER_LOGITS
    extra = torch.arange(n, k.shape[2], device=q.device)
    for alike in product(*map(runs, geometry.axes, _TILES[len(geometry.axes)])):
        origins, queries, keys, seen, row = (x.to(q.device) for x in _places(geometry, alike))
        mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)[None]
        mask = F.pad(mask if table is None else mask + table[:, row], (0, len(extra)))
        most = max(1, limit // mask[0].numel())
        tiles = min(most, len(origins))
        deep = min(max(1, most // tiles), heads)
        high = max(1, most // (tiles * deep))
        for image, head, at in product(range(0, b, high), range(0, heads, deep), origins.split(tiles)):
            share, at = slice(head, head + deep), at[:, None]
            seen = torch.cat([at + keys, extra.expand(len(at), -1)], 1)
            own = mask if table is None else mask[share]
            yield _Block(slice(image, image + high), share, at + queries, seen, own, row)


def _places(geometry: Geometry, alike: tuple[Run, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """First tokens of tiles that lie alike (nt,), their queries (n,) and keys (m,) from there, and pairs (n, m)."""
    own, other = [run.first.own for run in alike], [run.first.other for run in alike]
    seen, row = pairs(geometry, own, other)
    used = seen.any(0)
    apart = [torch.arange(span.start, span.stop) - first.start for span, first in zip(other, own, strict=True)]
    steps = [axis.dilation for axis in geometry.axes]
    return (
        tokens(geometry.axes, [torch.tensor(run.positions) for run in alike]),
        tokens(geometry.axes, [torch.arange(len(span)) * step for span, step in zip(own, steps, strict=True)]),
        tokens(geometry.axes, [span * step for span, step in zip(apart, steps, strict=True)])[used],
        seen[:, used],
        row[:, used],
    )


def _counts(x: Tensor, block: _Block) -> tuple[int, int, int]:
    """Images, heads and tiles of a block."""
    images, heads = x[block.images, block.heads].shape[:2]
    return images, heads, len(block.queries)


def _take(x: Tensor, block: _Block, index: Tensor) -> Tensor:
    """Tokens of the tiles, (b heads nt) n d."""
    share = x[block.images, block.heads].index_select(2, index.flatten())
    return share.unflatten(2, index.shape).flatten(0, 2)


def _put(x: Tensor, block: _Block, share: Tensor) -> None:
    """Write (b heads nt) n d, or (b heads nt) n, to the queries of the tiles."""
    share = share.reshape(*_counts(x, block)[:2], -1, *share.shape[2:])  # b heads (nt n) d
    x[block.images, block.heads].index_copy_(2, block.queries.flatten(), share.to(x.dtype))


def _add(x: Tensor, block: _Block, share: Tensor) -> None:
    """Add (b heads nt) m d to the keys of the tiles."""
    share = share.reshape(*_counts(x, block)[:2], -1, share.shape[2])  # b heads (nt m) d
    x[block.images, block.heads].index_add_(2, block.keys.flatten(), share)


def _attend(q: Tensor, k: Tensor, v: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Output (b heads nt) n e, and logarithms of the sums of exponentials, (b heads nt) n."""
    if q.device.type == "cpu" and q.shape[2] == v.shape[2]:  # logits stay in the innermost cache
        parts = (t.unflatten(0, (-1, len(block.queries))) for t in (q, k, v))  # (b heads) nt n d
        mask = _repeated(block.mask, len(q) // len(block.queries))[:, None]
        y, norm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, attn_mask=mask, scale=scale)
        return y.flatten(0, 1), norm.flatten(0, 1)
    logits, p = _softmax(q, k, block, scale)
    return torch.bmm(v.mT, p.mT).mT, logits.amax(-1) - p.amax(-1).log_()


def _softmax(q: Tensor, k: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Logits and probabilities, (b heads nt) n m."""
    mask = block.mask
    if len(mask) > 1:
        mask = _repeated(mask.repeat_interleave(len(block.queries), 0), len(q))
    logits = torch.baddbmm(mask.expand(len(q), -1, -1), q, k.mT, alpha=scale)
    return logits, torch.softmax(logits, -1)


def _repeated(mask: Tensor, count: int) -> Tensor:
    """The masks of all images one after the other, (count, n, m), unless one is for all."""
    return mask if len(mask) in (1, count) else mask.repeat(count // len(mask), 1, 1)
