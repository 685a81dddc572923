"""Block-sparse attention: what is compiled, and what is timed beside dense attention."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Call, Case, by_impl, flex, on_gpu
from zoo.kernels.block_sparse_attention import TokenRule, block_mass, block_sparse_attention
from zoo.kernels.block_sparse_attention.plan import Choice, visits


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Blocks of 64 by mask, blocks of 128 cut by a token rule, dense attention, and the masses of blocks."""
    n = 256
    q, k, v = (torch.zeros(2, 2, n, head_dim, dtype=dtype, requires_grad=True) for _ in range(3))
    group = torch.arange(n, dtype=torch.int32) // 100
    rule = TokenRule(group, group, torch.eye(3, dtype=torch.bool))
    calls = (
        {"block": 64, "mask": torch.ones(1, 2, 4, 4, dtype=torch.bool)},
        {"block": 128, "rule": rule, "key_lengths": torch.tensor([n, n])},
        {"block": 64},
    )
    for options in calls:
        block_sparse_attention(q, k, v, impl="triton", **options).sum().backward()
    block_mass(q, k, impl="triton")


def timed(quick: bool) -> Iterator[Case]:
    """Own random masks for each head at two sparsities, beside our own dense attention; forward and backward."""
    b, heads = (4, 16) if on_gpu() else (1, 8)
    for n, sparsity in ((1024, 0.8),) if quick else ((4096, 0.0), (4096, 0.8), (4096, 0.9), (16384, 0.8), (16384, 0.9)):
        yield _case(b, heads, n, sparsity)


def _case(b: int, heads: int, n: int, sparsity: float, d: int = 64, block: int = 64) -> Case:
    q, k, v = (torch.randn(b, heads, n, d) for _ in range(3))
    mask = torch.rand(1, heads, n // block, n // block) >= sparsity if sparsity else None
    pairs = b * (heads * n**2 if mask is None else int(mask.sum()) * block**2)
    peers: dict[str, Call] = {"dense SDPA (all blocks)": F.scaled_dot_product_attention}
    if mask is not None:
        kept = mask[0]
        peers["lists of blocks alone"] = lambda q, k, v: _lists(q, mask, n, block)
        peers["flex_attention"] = flex(lambda b, h, i, j: kept[h, i // block, j // block], n, n, block, heads)
    return Case(
        op="block_sparse_attention",
        shape=f"b={b} heads={heads} n={n} d={d} block={block} sparsity={sparsity}",
        inputs=(q, k, v),
        ours=by_impl(lambda impl, q, k, v: block_sparse_attention(q, k, v, block=block, mask=mask, impl=impl)),
        peers=peers,
        flops=4.0 * pairs * d,
        bytes=4.0 * q.nbytes,
        trained=(14.0 * pairs * d, 11.0 * q.nbytes) if n == 4096 or on_gpu() else None,
        untrained=frozenset(["lists of blocks alone"] + ["flex_attention"] * (not on_gpu())),
    )


def _lists(q: Tensor, mask: Tensor, n: int, block: int) -> Tensor:
    choice = Choice(mask, None, None, (block, block), 1.0)
    if not on_gpu():
        return visits(choice, n, n, q.device)[1]
    from zoo.kernels.block_sparse_attention import triton_impl

    return triton_impl._lists(choice, n, n, False, q.device)[1]
