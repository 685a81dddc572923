"""Softmax attention over chosen blocks of the map of queries and keys.

For query i, over the keys j that it sees:

    o_i = sum_j p_ij v_j        p_ij = exp(scale q_i . k_j - lse_i)        lse_i = log sum_j exp(scale q_i . k_j)

Query i sees key j where three things agree, each of which may be left out:

1. the block (i // bm, j // bn) is kept: `mask` or `index`, for each sample and head or for all;
2. a rule about the tokens' groups says so: allowed[group of i, group of j]. Groups are frames, for example, whose
   borders need not be borders of blocks. Blocks without an allowed pair are skipped, and only blocks that the rule
   cuts in two are looked at token by token;
3. j is below the key length of its sample.

The last block of either side may be ragged. A query that sees nothing gives zeros and lse -inf. The mass of a block is
the sum of its p_ij, so that masses of a row of blocks sum up to the number of its queries.

Source: FlashAttention (Dao et al. 2022) for the recursion over blocks; AdaSpa (Xia et al. 2025) for masses;
Efficient-vDiT (Ding et al. 2025) for masks by frame; SeerAttention (Gao et al. 2024) for the largest p of a block.
"""

from types import ModuleType

import torch
from torch import Tensor

from zoo.kernels.impls import pick

from .merging import merge
from .plan import Choice, TokenRule, block_cover, blocks, mask_of, pack_mask, unpack_mask

__all__ = ["TokenRule", "block_cover", "block_mass", "block_sparse_attention", "merge", "pack_mask", "unpack_mask"]


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int | tuple[int, int] = 64,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    rule: TokenRule | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_block_max: bool = False,
    return_block_mass: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attend inside the kept blocks. Output and lse are differentiable in q, k and v; what blocks hold is not.

    Args:
        q: queries, (b, heads, n, d), d at least 1, any strides.
        k: keys, (b, heads, m, d), dtype of `q`.
        v: values, (b, heads, m, e), dtype of `q`.
        block: queries and keys of a block (bm, bn), or one number for both. There are mq = ceil(n / bm) rows and
            mk = ceil(m / bn) columns of blocks. Triton wants multiples of 16.
        mask: kept blocks, bool (b or 1, heads or 1, mq, mk), or the same in bits: uint8 (.., mq, ceil(mk / 8)) as
            `pack_mask` makes it. All blocks when neither `mask` nor `index` is given.
        index: kept columns of each row instead of a mask, integers (b or 1, heads or 1, mq, any width) in any order,
            unused places negative.
        rule: which tokens see each other, for all samples and heads.
        key_lengths: keys of each sample, integers (b,); those behind are not seen.
        scale: factor of the products; d^-0.5 when None.
        return_lse: also return lse.
        return_block_max: also return the largest p_ij of each block.
        return_block_mass: also return the sum of the p_ij of each block.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, heads, n, e), dtype of `q`; with flags a tuple of it and, in this order, lse (b, heads, n), largest p and
        mass (b, heads, mq, mk), all in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or an unknown `impl`.
    """
    op = "block_sparse_attention"
    size = _check_block(op, block)
    _check_tokens(op, q, k, key_lengths)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.dtype != q.dtype:
        raise ValueError(
            f"{op}: v must be {q.dtype} {(*k.shape[:3], 'e')} for k {tuple(k.shape)}, got {v.dtype} {tuple(v.shape)}"
        )
    rows, columns = blocks(q.shape[2], size[0]), blocks(k.shape[2], size[1])
    if index is not None:
        if mask is not None:
            raise ValueError(f"{op}: mask and index must not come together, got both")
        _check_choice(
            op, "index", index, q.shape[:2], (rows, None), index.dtype in (torch.int16, torch.int32, torch.int64)
        )
        mask = mask_of(index, columns)
    elif mask is not None:
        width = columns if mask.dtype == torch.bool else blocks(columns, 8)
        _check_choice(op, "mask", mask, q.shape[:2], (rows, width), mask.dtype in (torch.bool, torch.uint8))
    _check_rule(op, rule, q.shape[2], k.shape[2])
    chosen = _implementation(op, impl, q, v.shape[3], size)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    choice = Choice(mask, rule, key_lengths, size, factor)
    out, lse = chosen.forward(q, k, v, choice)
    found = [out, lse] if return_lse else [out]
    with torch.no_grad():
        for wanted, largest in ((return_block_max, True), (return_block_mass, False)):
            if wanted:
                found.append(chosen.statistic(q.detach(), k.detach(), lse.detach(), choice, largest))
    return tuple(found) if len(found) > 1 else out


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block: int | tuple[int, int] = 64,
    lse: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum the probabilities of dense attention over each block; not differentiable.

        mass[p, r] = sum over i in block p and j in block r of exp(scale q_i . k_j - lse_i)

    Args:
        q: queries, (b, heads, n, d), d at least 1, any strides.
        k: keys, (b, heads, m, d), dtype of `q`.
        block: queries and keys of a block (bm, bn), or one number for both.
        lse: of each query, (b, heads, n), from this or an earlier step; a dense pass finds it when None. Attention
            with `return_block_mass` gives outputs and masses in one call.
        key_lengths: keys of each sample, integers (b,); those behind are not counted.
        scale: factor of the products; d^-0.5 when None.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, heads, ceil(n / bm), ceil(m / bn)), float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or an unknown `impl`.
    """
    op = "block_mass"
    size = _check_block(op, block)
    _check_tokens(op, q, k, key_lengths)
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"{op}: lse must be {tuple(q.shape[:3])} for q {tuple(q.shape)}, got {tuple(lse.shape)}")
    chosen = _implementation(op, impl, q, 0, size)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    choice = Choice(None, None, key_lengths, size, factor)
    q, k, wide = q.detach(), k.detach(), torch.promote_types(q.dtype, torch.float32)
    with torch.no_grad():
        norm = chosen.forward(q, k, k[..., :0], choice)[1] if lse is None else lse.detach().to(wide)
        return chosen.statistic(q, k, norm, choice, False)


def _implementation(op: str, impl: str, q: Tensor, e: int, block: tuple[int, int]) -> ModuleType:
    fits = not (block[0] % 16 or block[1] % 16) and max(q.shape[3], e) <= 256 and q.dtype != torch.float64
    chosen = pick(op, impl, q, triton=fits)
    if chosen == "reference":
        from . import reference as module
    elif chosen == "torch":
        from . import torch_impl as module
    else:
        from . import triton_impl as module
    return module


def _check_block(op: str, block: int | tuple[int, int]) -> tuple[int, int]:
    size = (block, block) if isinstance(block, int) else tuple(block)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"{op}: block must be one number or (bm, bn), each at least 1, got {block}")
    return size


def _check_tokens(op: str, q: Tensor, k: Tensor, lengths: Tensor | None) -> None:
    if q.ndim != 4 or not q.shape[3] or not q.is_floating_point():
        raise ValueError(f"{op}: q must be float (b, heads, n, d) with d at least 1, got {q.dtype} {tuple(q.shape)}")
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]) or k.dtype != q.dtype:
        raise ValueError(
            f"{op}: k must be {q.dtype} {(*q.shape[:2], 'm', q.shape[3])} for q {tuple(q.shape)}, "
            f"got {k.dtype} {tuple(k.shape)}"
        )
    if lengths is not None and (lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64)):
        raise ValueError(
            f"{op}: key_lengths must be int32 or int64 {tuple(q.shape[:1])}, got {lengths.dtype} {tuple(lengths.shape)}"
        )


def _check_choice(
    op: str, name: str, given: Tensor, outer: torch.Size, inner: tuple[int, int | None], typed: bool
) -> None:
    fits = typed and given.ndim == 4 and all(have in (1, want) for have, want in zip(given.shape, outer, strict=False))
    if not fits or given.shape[2] != inner[0] or inner[1] not in (None, given.shape[3]):
        kind = "integers" if name == "index" else "bool, or uint8 in bits,"
        want = (*(f"{size} or 1" for size in outer), inner[0], inner[1] or "width")
        raise ValueError(f"{op}: {name} must be {kind} {want}, got {given.dtype} {tuple(given.shape)}")


def _check_rule(op: str, rule: TokenRule | None, n: int, m: int) -> None:
    if rule is None:
        return
    for name, group, count in (("query", rule.query, n), ("key", rule.key, m)):
        if group.shape != (count,) or group.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{op}: rule.{name} must be int32 or int64 {(count,)}, got {group.dtype} {tuple(group.shape)}"
            )
    if rule.allowed.ndim != 2 or rule.allowed.dtype != torch.bool:
        raise ValueError(
            f"{op}: rule.allowed must be bool (query groups, key groups), "
            f"got {rule.allowed.dtype} {tuple(rule.allowed.shape)}"
        )
