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

# Logits in work at once. CPU: 1 MiB in float32, which stays in the caches. Elsewhere launches cost more than traffic.
_CPU_LOGITS, _OTHER_LOGITS = 2**18, 2**25
# Queries of a tile along each axis: larger ones gather less, smaller ones compute fewer logits in vain.
_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


class _Block(NamedTuple):
    """Tiles that lie alike, of some images and heads."""

    images: slice
    heads: slice
    queries: Tensor  # nt n: tokens of each tile
    keys: Tensor  # nt m
    mask: Tensor  # heads n (m extra): bias, or -inf where nothing is seen
    row: Tensor  # n m: of the bias table


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
    q, k, v = (_whole(t) for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, extra_k, table, geometry):
            qs = _take(q, block, block.queries)  # (b heads nt) n d
            ks, vs = _take(k, block, block.keys, extra_k), _take(v, block, block.keys, extra_v)
            logits, p = _attend(qs, ks, block, scale)
            # d by n, not n by d: BLAS is up to five times slower at a result only d wide.
            _put(out, block, torch.bmm(vs.mT, p.mT).mT)
            _put(lse, block, logits.amax(-1) - p.amax(-1).log_())
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
    inputs = [q, k, v, extra_k, extra_v, table]
    gradients = [None if t is None else torch.zeros_like(t, dtype=_wide(q.dtype)) for t in inputs]
    dq, dk, dv, dextra_k, dextra_v, dtable = gradients
    dout = torch.zeros_like(v) if dout is None else dout
    dout, q, k, v = (_whole(t) for t in (dout, q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        for block in _blocks(q, extra_k, table, geometry):
            qs, dos = (_take(t, block, block.queries) for t in (q, dout))
            ks, vs = _take(k, block, block.keys, extra_k), _take(v, block, block.keys, extra_v)
            logits, p = _attend(qs, ks, block, scale)
            dp = torch.bmm(dos, vs.mT)
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=logits)
            if dlse is not None:
                ds.addcmul_(p, _take(dlse[..., None], block, block.queries))
            _put(dq, block, torch.bmm(ks.mT, ds.mT).mT.mul_(scale))
            _add(dk, dextra_k, block, torch.bmm(qs.mT, ds).mT.mul_(scale))
            _add(dv, dextra_v, block, torch.bmm(dos.mT, p).mT)
            if dtable is not None:
                share = ds[..., : block.row.shape[1]].unflatten(0, _counts(q, block))  # b heads nt n m
                dtable[block.heads].index_add_(1, block.row.flatten(), share.sum((0, 2)).flatten(1))
    return [d.to(t.dtype) for d, t in zip(gradients, inputs, strict=True) if d is not None and t is not None]


@_backward.register_fake
def _(dout: Tensor | None, dlse: Tensor | None, *inputs: Any) -> list[Tensor]:  # noqa: ANN401
    return [torch.empty_like(t) for t in inputs[:6] if t is not None]


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


def _whole(x: Tensor) -> Tensor:
    """In float32 or wider, a head in one piece: each token is gathered several times, from afar three times slower."""
    return x.to(_wide(x.dtype)).contiguous()


def _blocks(q: Tensor, extra_k: Tensor | None, table: Tensor | None, numbers: list[int]) -> Iterator[_Block]:
    """Cut the work into blocks of a bounded number of logits, as far as a single tile allows."""
    geometry, (b, heads, *_) = Geometry.unpack(numbers), q.shape
    limit = _CPU_LOGITS if q.device.type == "cpu" else _OTHER_LOGITS
    extras = 0 if extra_k is None else extra_k.shape[2]
    for alike in product(*map(runs, geometry.axes, _TILES[len(geometry.axes)])):
        origins, queries, keys, seen, row = (x.to(q.device) for x in _places(geometry, alike))
        mask = torch.zeros(seen.shape, dtype=_wide(q.dtype), device=q.device).masked_fill_(~seen, -torch.inf)
        mask = F.pad(mask if table is None else mask + table[:, row], (0, extras)).expand(heads, -1, -1)
        most = max(1, limit // (mask.shape[1] * mask.shape[2]))
        tiles = min(most, len(origins))
        deep = min(max(1, most // tiles), heads)
        high = max(1, most // (tiles * deep))
        for image, head, at in product(range(0, b, high), range(0, heads, deep), origins.split(tiles)):
            share = slice(head, head + deep)
            at = at[:, None]
            yield _Block(slice(image, image + high), share, at + queries, at + keys, mask[share], row)


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
    return *x[block.images, block.heads].shape[:2], len(block.queries)


def _take(x: Tensor, block: _Block, index: Tensor, extra: Tensor | None = None) -> Tensor:
    """Tokens of the tiles, then the extra ones, (b heads nt) n d."""
    share = x[block.images, block.heads].index_select(2, index.flatten()).unflatten(2, index.shape)  # b heads nt n d
    if extra is not None:
        more = extra[block.images, block.heads].to(share.dtype)[:, :, None]
        share = torch.cat([share, more.expand(-1, -1, len(index), -1, -1)], 3)
    return share.flatten(0, 2)


def _put(x: Tensor, block: _Block, share: Tensor) -> None:
    """Write (b heads nt) n d, or (b heads nt) n, to the queries of the tiles."""
    share = share.reshape(*_counts(x, block)[:2], -1, *share.shape[2:])  # b heads (nt n) d
    x[block.images, block.heads].index_copy_(2, block.queries.flatten(), share.to(x.dtype))


def _add(x: Tensor, extra: Tensor | None, block: _Block, share: Tensor) -> None:
    """Add (b heads nt) (m extra) d to the keys of the tiles and to the extra ones."""
    share, m = share.unflatten(0, _counts(x, block)), block.keys.shape[1]  # b heads nt (m extra) d
    x[block.images, block.heads].index_add_(2, block.keys.flatten(), share[..., :m, :].flatten(2, 3))
    if extra is not None:
        extra[block.images, block.heads] += share[..., m:, :].sum(2)


def _attend(q: Tensor, k: Tensor, block: _Block, scale: float) -> tuple[Tensor, Tensor]:
    """Logits and probabilities, (b heads nt) n (m extra)."""
    heads, n, m = block.mask.shape
    mask = block.mask[:1].expand(len(q), n, m)
    if block.mask.stride(0):  # a bias, which differs between heads
        tiles = len(block.queries)
        mask = block.mask[:, None].expand(len(q) // (heads * tiles), heads, tiles, n, m).flatten(0, 2)
    logits = torch.baddbmm(mask, q, k.mT, alpha=scale)
    return logits, torch.softmax(logits, -1)
