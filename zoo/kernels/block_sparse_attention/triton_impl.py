"""A program takes queries along their row of blocks, or keys along their column; gradients need no atomics.

Each row and column of blocks gets a list of what it visits: blocks that are seen whole come first and are computed
without any check, those that the end or a token rule cuts come from the back of the list. The lists are built anew in
every call, from bits if there are bits: that reads each block of the mask once. Without mask and rule there are no
lists, and tiles do not depend on blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.rounding import INTERPRETED, narrow

from .plan import CHOICE, Choice, block_cover, blocks, words_of
from .tuning import BACKWARD_KEYS, BACKWARD_QUERIES, FORWARD, STATISTIC, tile

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _list_kernel(
    mask_ptr, cover_ptr, lengths_ptr, counts_ptr, lists_ptr,
    mask_b, mask_h, mask_i, mask_j, rows, columns, n, m,
    BM: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr, MASKED: tl.constexpr, RULED: tl.constexpr,
    LENGTHS: tl.constexpr, BY_COLUMN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    line, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    size = rows if BY_COLUMN else columns
    own = (sample.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + line
    lists_ptr += own * size
    mask_ptr += sample.to(tl.int64) * mask_b + head.to(tl.int64) * mask_h
    length = tl.load(lengths_ptr + sample) if LENGTHS else m
    whole, cut = 0, 0
    for start in range(0, size, CHUNK):
        at = start + tl.arange(0, CHUNK)
        i = at if BY_COLUMN else line + at * 0
        j = line + at * 0 if BY_COLUMN else at
        kept = (at < size) & (j * BN < length)
        if MASKED:
            bits = tl.load(mask_ptr + i.to(tl.int64) * mask_i + (j // BITS) * mask_j, mask=kept, other=0).to(tl.int32)
            kept = kept & (((bits >> (BITS - 1 - j % BITS)) & 1) != 0)
        open = (i + 1) * BM > n if BY_COLUMN else (j + 1) * BN > length
        if RULED:
            cover = tl.load(cover_ptr + i.to(tl.int64) * columns + j, mask=kept, other=0)
            kept, open = kept & (cover > 0), open | (cover < 2)
        first, second = (kept & (open == 0)).to(tl.int32), (kept & open).to(tl.int32)
        tl.store(lists_ptr + whole + tl.cumsum(first) - 1, at, mask=first > 0)
        tl.store(lists_ptr + size - cut - tl.cumsum(second), at, mask=second > 0)
        whole += tl.sum(first)
        cut += tl.sum(second)
    tl.store(counts_ptr + own * 2, whole)
    tl.store(counts_ptr + own * 2 + 1, cut)


@triton.jit
def _dot(a, b, acc=None):
    if INTERPRETED:  # see zoo.kernels.chips
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")  # tf32 loses half the digits of float32


@triton.jit
def _load(ptr, start, stride, stride_d, limit, T: tl.constexpr, D: tl.constexpr, CHECKED: tl.constexpr):
    """Tokens start .. start + T of one head, zeros from `limit` on, (T, next power of two of D)."""
    token, d = tl.arange(0, T), tl.arange(0, triton.next_power_of_2(D) if D > 16 else 16)
    at = ptr + (start.to(tl.int64) + token)[:, None] * stride + d[None, :].to(tl.int64) * stride_d
    inside = d[None, :] < D
    if CHECKED:
        return tl.load(at, mask=(start + token < limit)[:, None] & inside, other=0.0)
    if d.shape[0] == D:
        return tl.load(at)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, x, start, limit, T: tl.constexpr, D: tl.constexpr):
    """Write tokens (T, padded D) to a contiguous (limit, D)."""
    token, d = tl.arange(0, T), tl.arange(0, x.shape[1])
    at = ptr + start.to(tl.int64) * D + (token[:, None] * D + d[None, :])
    tl.store(at, narrow(x, ptr.dtype.element_ty), mask=(start + token < limit)[:, None] & (d < D)[None, :])


@triton.jit
def _seen(
    query_ptr, key_ptr, words_ptr, words, rows, keys, n, m, length, RULED: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """Which pairs of a cut block are seen; the rule comes in bits, since a table would take a register a pair."""
    seen = keys[:, None] + rows[None, :] * 0 < length if KEYS_FIRST else rows[:, None] * 0 + keys[None, :] < length
    if RULED:
        query = tl.load(query_ptr + rows, mask=rows < n, other=0)
        key = tl.load(key_ptr + keys, mask=keys < m, other=0)
        allowed = seen & False
        for w in range(words):
            bit, word = tl.where(key // 32 == w, 1 << key % 32, 0), tl.load(words_ptr + query * words + w)
            both = bit[:, None] & word[None, :] if KEYS_FIRST else word[:, None] & bit[None, :]
            allowed = allowed | (both != 0)
        seen = seen & allowed
    return seen


@triton.jit
def _list(counts_ptr, lists_ptr, line, list_b, list_h, size, tokens, LISTED: tl.constexpr, T: tl.constexpr):
    """Where the list of a row or column is, and how many whole and cut blocks (without lists: tiles) it holds."""
    if LISTED:
        own = tl.program_id(2).to(tl.int64) * list_b + tl.program_id(1) * list_h + line
        return lists_ptr + own * size, tl.load(counts_ptr + own * 2), tl.load(counts_ptr + own * 2 + 1)
    return lists_ptr, tokens // T, (tokens % T > 0).to(tl.int32)


@triton.jit
def _token(list_ptr, t, whole, size, CUT: tl.constexpr, LISTED: tl.constexpr, BLOCK: tl.constexpr, T: tl.constexpr):
    """First token of the t-th tile that a list visits."""
    if LISTED:
        parts: tl.constexpr = BLOCK // T
        place = size - 1 - t // parts if CUT else t // parts
        return tl.load(list_ptr + place).to(tl.int32) * BLOCK + t % parts * T
    return (whole + t if CUT else t) * T


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d,
    counts_ptr, lists_ptr, list_b, list_h, size, lengths_ptr, query_ptr, key_ptr, words_ptr, words, n, m, scale,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LISTED: tl.constexpr, RULED: tl.constexpr,
    LENGTHS: tl.constexpr, CUTS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    start, head, sample = tl.program_id(0) * TM, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = start + tl.arange(0, TM)
    q = _load(q_ptr + sample * q_b + head * q_h, start, q_n, q_d, n, TM, D, True)
    k_ptr += sample * k_b + head * k_h
    v_ptr += sample * v_b + head * v_h
    length = tl.load(lengths_ptr + sample) if LENGTHS else m
    list_ptr, whole, cut = _list(counts_ptr, lists_ptr, start // BM, list_b, list_h, size, length, LISTED, TN)
    most, total = tl.full([TM], -float("inf"), tl.float32), tl.zeros([TM], tl.float32)
    acc = tl.zeros([TM, triton.next_power_of_2(E) if E > 16 else 16], tl.float32)
    for checked in tl.static_range(1 + CUTS):
        for t in range((cut if checked else whole) * (BN // TN if LISTED else 1)):
            first = _token(list_ptr, t, whole, size, checked, LISTED, BN, TN)
            k = _load(k_ptr, first, k_n, k_d, length, TN, D, checked)
            logits = _dot(q, tl.trans(k)) * (scale * _LOG2E)
            if checked:
                keys = first + tl.arange(0, TN)
                seen = _seen(query_ptr, key_ptr, words_ptr, words, rows, keys, n, m, length, RULED, False)
                logits = tl.where(seen, logits, -float("inf"))
            new = tl.maximum(most, tl.max(logits, 1))
            anchor = tl.where(new == -float("inf"), 0.0, new) if checked else new  # -inf - -inf is NaN
            p, shrink = tl.exp2(logits - anchor[:, None]), tl.exp2(most - anchor)
            most, total = new, total * shrink + tl.sum(p, 1)
            if E > 0:
                v = _load(v_ptr, first, v_n, v_d, length, TN, E, checked)
                acc = _dot(narrow(p, v.dtype), v, acc * shrink[:, None])
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    own = sample * tl.num_programs(1) + head
    tl.store(lse_ptr + own * n + rows, tl.where(empty, -float("inf"), (most + tl.log2(total)) / _LOG2E), mask=rows < n)
    if E > 0:
        _store(out_ptr + own * n * E, acc / total[:, None], start, n, TM, E)


@triton.jit
def _query_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_h, do_n, do_d,
    counts_ptr, lists_ptr, list_b, list_h, size, lengths_ptr, query_ptr, key_ptr, words_ptr, words, n, m, scale,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LISTED: tl.constexpr, RULED: tl.constexpr,
    LENGTHS: tl.constexpr, CUTS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    start, head, sample = tl.program_id(0) * TM, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    own = sample * tl.num_programs(1) + head
    rows = start + tl.arange(0, TM)
    q = _load(q_ptr + sample * q_b + head * q_h, start, q_n, q_d, n, TM, D, True)
    do = _load(do_ptr + sample * do_b + head * do_h, start, do_n, do_d, n, TM, E, True)
    out = _load(out_ptr + own * n * E, start, E, 1, n, TM, E, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    delta -= tl.load(dlse_ptr + own * n + rows, mask=rows < n, other=0.0)
    tl.store(delta_ptr + own * n + rows, delta, mask=rows < n)
    lse = tl.load(lse_ptr + own * n + rows, mask=rows < n, other=-float("inf")) * _LOG2E
    lse = tl.where(lse == -float("inf"), float("inf"), lse)  # so that p is 0 where nothing is seen
    k_ptr += sample * k_b + head * k_h
    v_ptr += sample * v_b + head * v_h
    length = tl.load(lengths_ptr + sample) if LENGTHS else m
    list_ptr, whole, cut = _list(counts_ptr, lists_ptr, start // BM, list_b, list_h, size, length, LISTED, TN)
    dq = tl.zeros([TM, q.shape[1]], tl.float32)
    for checked in tl.static_range(1 + CUTS):
        for t in range((cut if checked else whole) * (BN // TN if LISTED else 1)):
            first = _token(list_ptr, t, whole, size, checked, LISTED, BN, TN)
            k = _load(k_ptr, first, k_n, k_d, length, TN, D, checked)
            v = _load(v_ptr, first, v_n, v_d, length, TN, E, checked)
            p = tl.exp2(_dot(q, tl.trans(k)) * (scale * _LOG2E) - lse[:, None])
            if checked:
                keys = first + tl.arange(0, TN)
                seen = _seen(query_ptr, key_ptr, words_ptr, words, rows, keys, n, m, length, RULED, False)
                p = tl.where(seen, p, 0.0)
            ds = p * (_dot(do, tl.trans(v)) - delta[:, None])
            dq = _dot(narrow(ds, k.dtype), k, dq)
    _store(dq_ptr + own * n * D, dq * scale, start, n, TM, D)


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, do_b, do_h, do_n, do_d,
    counts_ptr, lists_ptr, list_b, list_h, size, lengths_ptr, query_ptr, key_ptr, words_ptr, words, n, m, scale,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LISTED: tl.constexpr, RULED: tl.constexpr,
    LENGTHS: tl.constexpr, CUTS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr,
):  # fmt: skip
    start, head, sample = tl.program_id(0) * TN, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    own = sample * tl.num_programs(1) + head
    keys = start + tl.arange(0, TN)
    k = _load(k_ptr + sample * k_b + head * k_h, start, k_n, k_d, m, TN, D, True)
    v = _load(v_ptr + sample * v_b + head * v_h, start, v_n, v_d, m, TN, E, True)
    q_ptr += sample * q_b + head * q_h
    do_ptr += sample * do_b + head * do_h
    length = tl.load(lengths_ptr + sample) if LENGTHS else m
    list_ptr, whole, cut = _list(counts_ptr, lists_ptr, start // BN, list_b, list_h, size, n, LISTED, TM)
    dk, dv = tl.zeros([TN, k.shape[1]], tl.float32), tl.zeros([TN, v.shape[1]], tl.float32)
    for checked in tl.static_range(1 + CUTS):
        for t in range((cut if checked else whole) * (BM // TM if LISTED else 1)):
            first = _token(list_ptr, t, whole, size, checked, LISTED, BM, TM)
            rows = first + tl.arange(0, TM)
            q = _load(q_ptr, first, q_n, q_d, n, TM, D, checked)
            do = _load(do_ptr, first, do_n, do_d, n, TM, E, checked)
            lse = tl.load(lse_ptr + own * n + rows, mask=rows < n, other=-float("inf")) * _LOG2E
            lse = tl.where(lse == -float("inf"), float("inf"), lse)
            delta = tl.load(delta_ptr + own * n + rows, mask=rows < n, other=0.0)
            p = tl.exp2(_dot(k, tl.trans(q)) * (scale * _LOG2E) - lse[None, :])  # keys by queries
            if checked and RULED:
                seen = _seen(query_ptr, key_ptr, words_ptr, words, rows, keys, n, m, length, RULED, True)
                p = tl.where(seen, p, 0.0)
            dv = _dot(narrow(p, do.dtype), do, dv)
            ds = p * (_dot(v, tl.trans(do)) - delta[None, :])
            dk = _dot(narrow(ds, q.dtype), q, dk)
    real = (keys < length)[:, None]  # what was computed for the others means nothing
    _store(dk_ptr + own * m * D, tl.where(real, dk * scale, 0.0), start, m, TN, D)
    _store(dv_ptr + own * m * E, tl.where(real, dv, 0.0), start, m, TN, E)


@triton.jit
def _statistic_kernel(
    q_ptr, k_ptr, lse_ptr, found_ptr, q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d,
    counts_ptr, lists_ptr, list_b, list_h, size, lengths_ptr, query_ptr, key_ptr, words_ptr, words, n, m, scale,
    D: tl.constexpr, E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LISTED: tl.constexpr, RULED: tl.constexpr,
    LENGTHS: tl.constexpr, CUTS: tl.constexpr, TM: tl.constexpr, TN: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    line, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    own = sample * tl.num_programs(1) + head
    q_ptr += sample * q_b + head * q_h
    k_ptr += sample * k_b + head * k_h
    columns = tl.cdiv(m, BN)
    length = tl.load(lengths_ptr + sample) if LENGTHS else m
    list_ptr, whole, cut = _list(counts_ptr, lists_ptr, line, list_b, list_h, size, length, LISTED, BN)
    for checked in tl.static_range(1 + CUTS):
        for t in range(cut if checked else whole):
            block = _token(list_ptr, t, whole, size, checked, LISTED, BN, BN)
            sums = tl.zeros([TM], tl.float32)
            for part in range(BM // TM * (BN // TN)):
                start, first = line * BM + part % (BM // TM) * TM, block + part // (BM // TM) * TN
                rows, keys = start + tl.arange(0, TM), first + tl.arange(0, TN)
                q = _load(q_ptr, start, q_n, q_d, n, TM, D, True)
                k = _load(k_ptr, first, k_n, k_d, length, TN, D, checked)
                lse = tl.load(lse_ptr + own * n + rows, mask=rows < n, other=-float("inf")) * _LOG2E
                lse = tl.where(lse == -float("inf"), float("inf"), lse)
                p = tl.exp2(_dot(q, tl.trans(k)) * (scale * _LOG2E) - lse[:, None])
                if checked:
                    seen = _seen(query_ptr, key_ptr, words_ptr, words, rows, keys, n, m, length, RULED, False)
                    p = tl.where(seen, p, 0.0)
                sums = tl.maximum(sums, tl.max(p, 1)) if LARGEST else sums + tl.sum(p, 1)
            value = tl.max(sums) if LARGEST else tl.sum(sums)
            tl.store(found_ptr + (own * tl.num_programs(0) + line) * columns + block // BN, value)


def _lists(choice, n, m, by_column, device):
    """How many whole and cut blocks each row or column visits, (.., lines, 2), and which, (.., lines, blocks)."""
    mask, rule, lengths, block, _ = choice
    rows, columns = blocks(n, block[0]), blocks(m, block[1])
    lines, size = (columns, rows) if by_column else (rows, columns)
    b, heads, strides = 1 if lengths is None else len(lengths), 1, (0, 0, 0, 0)
    if mask is not None:
        strides = [0 if count == 1 else stride for count, stride in zip(mask.shape, mask.stride(), strict=True)]
        b, heads = max(b, mask.shape[0]), mask.shape[1]
    counts = torch.empty(b, heads, lines, 2, dtype=torch.int32, device=device)
    lists = torch.empty(b, heads, lines, size, dtype=torch.int16 if size < 2**15 else torch.int32, device=device)
    cover = None if rule is None else sum(part.to(torch.uint8) for part in block_cover(rule, block))
    given = (mask if mask is None else mask.view(torch.uint8), cover, lengths)
    _list_kernel[(lines, heads, b)](
        *(counts if t is None else t for t in given), counts, lists, *strides, rows, columns, n, m,
        BM=block[0], BN=block[1], BITS=8 if mask is not None and mask.dtype == torch.uint8 else 1,
        MASKED=mask is not None, RULED=rule is not None, LENGTHS=lengths is not None, BY_COLUMN=by_column,
        CHUNK=min(1024, max(16, triton.next_power_of_2(size))), num_warps=4,
    )  # fmt: skip
    return counts, lists


def _settings(table, q, k, e, flat, by_column=False, blocked=False):
    """How many tiles there are, and the arguments that the launches share."""
    choice, n, m = Choice.of(flat), q.shape[2], k.shape[2]
    if choice.key_lengths is not None:
        choice = choice._replace(key_lengths=choice.key_lengths.clamp(0, m).int())
    (mask, rule, lengths, block, scale), counts, lists, list_b, list_h = choice, q, q, 0, 0
    listed = mask is not None or rule is not None
    if listed:
        counts, lists = _lists(choice, n, m, by_column, q.device)
        list_b, list_h = (0 if lists.shape[i] == 1 else lists.stride(i) // lists.shape[3] for i in (0, 1))
    own, other = (block[::-1] if by_column else block) if listed or blocked else (None, None)
    t = tile(table, q, max(q.shape[3], e), own, other)
    tm, tn = (t.other, t.own) if by_column else (t.own, t.other)
    ragged = n % block[0] or n % tm if by_column else m % block[1] or m % tn or lengths is not None
    query, key, words = (q, q, q) if rule is None else (rule.query.int(), rule.key.int(), words_of(rule.allowed))
    return blocks(m if by_column else n, t.own), {
        "counts_ptr": counts, "lists_ptr": lists, "list_b": list_b, "list_h": list_h, "size": lists.shape[-1],
        "lengths_ptr": q if lengths is None else lengths, "query_ptr": query, "key_ptr": key,
        "words_ptr": words, "words": words.shape[1], "n": n, "m": m, "scale": scale,
        "D": q.shape[3], "E": e, "BM": block[0], "BN": block[1],
        "LISTED": listed, "RULED": rule is not None, "LENGTHS": lengths is not None,
        "CUTS": int(rule is not None or bool(ragged)), "TM": tm, "TN": tn,
        "num_warps": t.warps, "num_stages": t.stages,
    }  # fmt: skip


def _op(name, tensors, results, more=""):
    schema = f"(Tensor {', Tensor '.join(tensors.split())}, {more}{CHOICE}) -> {results}"
    return torch.library.custom_op(f"zoo::{name}", mutates_args=(), schema=schema)


@_op("block_sparse_attention_triton", "q k v", "(Tensor, Tensor)")
def _attention(q, k, v, *choice: object):
    (b, heads, n, _), e = q.shape, v.shape[3]
    out, lse = q.new_empty(b, heads, n, e), q.new_empty(b, heads, n, dtype=torch.float32)
    if not q.numel() or not k.shape[2]:
        return out.zero_(), lse.fill_(-torch.inf)
    tiles, settings = _settings(FORWARD, q, k, e, choice)
    strides = (*q.stride(), *k.stride(), *v.stride())
    _forward_kernel[(tiles, heads, b)](q, k, v, out, lse, *strides, **settings)
    return out, lse


_attention.register_fake(lambda q, k, v, *_: (q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3]).float()))


@_op("block_sparse_attention_triton_backward", "dout dlse out lse q k v", "(Tensor, Tensor, Tensor)")
def _backward(dout, dlse, out, lse, q, k, v, *choice: object):
    (b, heads, _, _), e = q.shape, v.shape[3]
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    if not q.numel() or not k.shape[2]:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta, dlse = torch.empty_like(lse), dlse.contiguous()
    strides = (*q.stride(), *k.stride(), *v.stride(), *dout.stride())
    tiles, settings = _settings(BACKWARD_QUERIES, q, k, e, choice)
    _query_kernel[(tiles, heads, b)](q, k, v, dout, out, lse, dlse, delta, dq, *strides, **settings)
    tiles, settings = _settings(BACKWARD_KEYS, q, k, e, choice, by_column=True)
    _key_kernel[(tiles, heads, b)](q, k, v, dout, lse, delta, dk, dv, *strides, **settings)
    return dq, dk, dv


_backward.register_fake(lambda dout, dlse, out, lse, *rest: tuple(t.new_empty(t.shape) for t in rest[:3]))


def _save(ctx, inputs, output):
    *tensors, ctx.block, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors)


def _grad(ctx, dout, dlse):
    return *_backward(dout, dlse, *ctx.saved_tensors, ctx.block, ctx.scale), *[None] * 7


_attention.register_autograd(_grad, setup_context=_save)


@_op("block_statistic_triton", "q k lse", "Tensor", more="bool largest, ")
def _statistic(q, k, lse, largest, *choice: object):
    found = q.new_zeros(Choice.of(choice).shape(q, k), dtype=torch.float32)
    if found.numel():
        _, settings = _settings(STATISTIC, q, k, 0, choice, blocked=True)
        grid, strides = (found.shape[2], q.shape[1], q.shape[0]), (*q.stride(), *k.stride())
        _statistic_kernel[grid](q, k, lse.contiguous(), found, *strides, LARGEST=largest, **settings)
    return found


_statistic.register_fake(lambda q, k, lse, largest, *choice: lse.new_empty(Choice.of(choice).shape(q, k)))


def forward(q: Tensor, k: Tensor, v: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    return _attention(q, k, v, *choice.flat())


def statistic(q: Tensor, k: Tensor, lse: Tensor, choice: Choice, largest: bool) -> Tensor:
    return _statistic(q, k, lse, largest, *choice.flat())
