"""One row of blocks after the other: its keys are gathered, so that all products are dense and none is masked in vain.

What lies beyond the last key is cut off; only blocks that a token rule cuts in two are masked. Registered as
`zoo::block_sparse_attention`, so that torch.compile sees one node and autograd keeps nothing but the inputs. The
backward takes softmax anew instead of exp(logits - lse): on a CPU torch's softmax is several times faster than its exp.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .plan import CHOICE, Choice, blocks, visits

# Logits in work at once, 4 MiB in float32: smaller parts of a row were not faster, they only bound the memory.
_LOGITS = 2**20


class _Row(NamedTuple):
    """Queries of one head and the keys that they visit."""

    head: int  # counted over all samples
    block: int
    queries: slice
    columns: Tensor  # (c,) int64
    seen: int  # of the c bn keys; the others are beyond the last
    hidden: Tensor | None  # (queries, last of the seen), True where the token rule forbids


def forward(q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, *choice.flat())


def statistic(q: Tensor, k: Tensor, lse: Tensor, choice: Choice, largest: bool) -> Tensor:
    return _statistic(q, k, lse, largest, *choice.flat())


@torch.library.custom_op(
    "zoo::block_sparse_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {CHOICE}) -> (Tensor, Tensor)",
)
def _attention(q: Tensor, k: Tensor, v: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    choice, wide = Choice.of(flat), _wide(q)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide.dtype, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=wide.dtype, device=q.device)
    qs, outs, lses = (_by_head(t) for t in (wide, out, lse))
    ks, vs = (_by_head(_blocked(t, choice.block[1])) for t in (k, v))
    space = _Space(wide)
    with torch.autocast(q.device.type, enabled=False):
        for row in _rows(q, k, choice):
            keys, values = space.gather("k", ks, row), space.gather("v", vs, row)
            p, lses[row.head][row.queries] = _softmax(qs[row.head][row.queries], keys, choice.scale, row, space)
            torch.mm(p, values, out=outs[row.head][row.queries])
    return out.to(q.dtype), lse


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return v.new_empty(*q.shape[:3], v.shape[3]), lse


@torch.library.custom_op(
    "zoo::block_sparse_attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, {CHOICE}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *flat: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor]:
    choice, wide = Choice.of(flat), _wide(q)
    keys_, values_ = (_blocked(t, choice.block[1]) for t in (k, v))
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (wide, keys_, values_))
    qs, dos, dlses, ks, vs = (_by_head(t) for t in (wide, _wide(dout), dlse, keys_, values_))
    dqs, dks, dvs = (_by_head(t) for t in (dq, dk, dv))
    space = _Space(wide)
    with torch.autocast(q.device.type, enabled=False):
        for row in _rows(q, k, choice):
            queries, do = qs[row.head][row.queries], dos[row.head][row.queries]
            keys, values = space.gather("k", ks, row), space.gather("v", vs, row)
            p, _ = _softmax(queries, keys, choice.scale, row, space)
            dp = torch.mm(do, values.mT, out=space.take("dp", *p.shape))
            # A constant that is added to a row of dp leaves ds as it is: the gradient of lse comes after.
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=space.take("ds", *p.shape))
            ds.addcmul_(p, dlses[row.head][row.queries, None])
            _product(ds, keys, choice.scale, dqs[row.head][row.queries])
            for sums, left, right, factor in ((dks, ds, queries, choice.scale), (dvs, p, do, 1.0)):
                part = space.take("d", len(row.columns), choice.block[1], right.shape[1])
                each = part.flatten(0, 1)
                each[row.seen :] = 0
                _product(left.mT, right, factor, each[: row.seen])
                sums[row.head].index_add_(0, row.columns, part)
    dk, dv = (t.flatten(2, 3)[:, :, : k.shape[2]].to(k.dtype).contiguous() for t in (dk, dv))
    return dq.to(q.dtype), dk, dv


@_backward.register_fake
def _(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    *tensors, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return *_backward(dout, dlse, *ctx.saved_tensors, ctx.block, ctx.scale), *[None] * 7


_attention.register_autograd(_grad, setup_context=_save)


@torch.library.custom_op(
    "zoo::block_statistic",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor lse, bool largest, {CHOICE}) -> Tensor",
)
def _statistic(q: Tensor, k: Tensor, lse: Tensor, largest: bool, *flat: Any) -> Tensor:  # noqa: ANN401
    choice, wide = Choice.of(flat), _wide(q)
    found = wide.new_zeros(choice.shape(q, k))
    qs, lses, ks, maps = (_by_head(t) for t in (wide, lse, _blocked(k, choice.block[1]), found))
    space = _Space(wide)
    with torch.autocast(q.device.type, enabled=False):
        for row in _rows(q, k, choice):
            keys = space.gather("k", ks, row)
            p, own = _softmax(qs[row.head][row.queries], keys, choice.scale, row, space)
            given = lses[row.head][row.queries]
            p *= (own - given).exp().masked_fill_(given == -torch.inf, 0)[:, None]
            each = F.pad(p.amax(0) if largest else p.sum(0), (0, len(row.columns) * choice.block[1] - row.seen))
            each = each.view(-1, choice.block[1])  # c bn
            here = maps[row.head][row.block]
            if largest:
                here[row.columns] = torch.maximum(here[row.columns], each.amax(1))
            else:
                here[row.columns] += each.sum(1)
    return found


@_statistic.register_fake
def _(q: Tensor, k: Tensor, lse: Tensor, largest: bool, *flat: Any) -> Tensor:  # noqa: ANN401
    return lse.new_empty(Choice.of(flat).shape(q, k))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(x: Tensor) -> list[Tensor]:
    """Views of the heads, sample by sample."""
    return [head for sample in x.unbind() for head in sample.unbind()]


def _blocked(x: Tensor, size: int) -> Tensor:
    """Tokens in whole blocks, (b, heads, blocks, size, d), zeros behind the last token."""
    count = blocks(x.shape[2], size)
    whole = _wide(x)
    if x.shape[2] != count * size:
        whole = F.pad(whole, (0, 0, 0, count * size - x.shape[2]))
    return whole.contiguous().view(*x.shape[:2], count, size, x.shape[3])


class _Space:
    """Buffers that every row takes anew: fresh memory costs page faults."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)

    def gather(self, name: str, heads: list[Tensor], row: _Row) -> Tensor:
        """Tokens that `row` sees, (seen, d)."""
        blocked = heads[row.head]  # mk bn d
        found = self.take(name, len(row.columns), *blocked.shape[1:])
        return torch.index_select(blocked, 0, row.columns, out=found).flatten(0, 1)[: row.seen]


def _product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> Tensor:
    """Write factor a b; BLAS multiplies by the factor for nothing."""
    return torch.addmm(out, a, b, beta=0, alpha=factor, out=out)


def _softmax(queries: Tensor, keys: Tensor, scale: float, row: _Row, space: _Space) -> tuple[Tensor, Tensor]:
    """Probabilities of a row, (queries, seen), in a buffer, and lse (queries,)."""
    p = _product(queries, keys.mT, scale, space.take("p", len(queries), row.seen))
    nothing = None
    if row.hidden is not None:
        p[:, row.seen - row.hidden.shape[1] :].masked_fill_(row.hidden, -torch.inf)
    most = p.amax(1)
    if row.hidden is not None:
        nothing = most == -torch.inf
        p.masked_fill_(nothing[:, None], 0)  # softmax of -inf alone is NaN
    torch.softmax(p, 1, out=p)
    lse = most - p.amax(1).log()  # the largest p is exp(most - lse)
    if nothing is not None:
        p.masked_fill_(nothing[:, None], 0)
    return p, lse


def _rows(q: Tensor, k: Tensor, choice: Choice) -> Iterator[_Row]:
    """Rows of blocks that visit anything, head by head; long ones in several parts."""
    (b, heads, n), m, (bm, bn) = q.shape[:3], k.shape[2], choice.block
    rule, key_lengths = choice.rule, choice.key_lengths
    counts, columns = visits(choice, n, m, q.device)
    lists = columns.split(counts.sum(-1).flatten().tolist())  # by sample, head and row, each may be shared
    whole = counts[..., 0].flatten().tolist()
    lengths = [m] * b if key_lengths is None else key_lengths.clamp(max=m).tolist()
    forbidden = None
    if rule is not None:
        forbidden = rule.query.long(), F.pad(rule.key.long(), (0, -m % bn)).view(-1, bn), ~rule.allowed
    for sample in range(b):
        for head in range(heads):
            first = (sample % counts.shape[0] * counts.shape[1] + head % counts.shape[1]) * counts.shape[2]
            for i in range(counts.shape[2]):
                visited = lists[first + i]
                if not len(visited):
                    continue
                # A block that the end cuts is not whole, hence the last of the list.
                seen = len(visited) * bn - max(0, (int(visited[-1]) + 1) * bn - lengths[sample])
                size = blocks(bm, blocks(bm * seen, _LOGITS))
                for start in range(i * bm, min(n, (i + 1) * bm), size):
                    queries = slice(start, min(start + size, n, (i + 1) * bm))
                    cut = None
                    if forbidden is not None and len(visited) > whole[first + i]:
                        query, key, hidden = forbidden  # n; mk bn; query groups, key groups
                        groups = key[visited[whole[first + i] :]].flatten()[: seen - whole[first + i] * bn]
                        cut = hidden[query[queries]][:, groups]
                    yield _Row(sample * heads + head, i, queries, visited, seen, cut)
