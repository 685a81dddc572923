"""Block-sparse attention: what is compiled, and what is timed beside dense attention."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
from zoo.kernels.block_sparse_attention import TokenRule, block_mass, block_sparse_attention


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
    """Own random masks for each head at two sparsities, forward and backward, float32."""
    for n, sparsity in ((1024, 0.8),) if quick else ((4096, 0.8), (4096, 0.9), (16384, 0.8), (16384, 0.9)):
        yield _case(n, sparsity, backward=False)
    yield _case(1024 if quick else 4096, 0.8, backward=True)


def _case(n: int, sparsity: float, *, backward: bool, heads: int = 8, d: int = 64, block: int = 64) -> Case:
    g = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(1, heads, n, d, generator=g) for _ in range(4))
    mask = torch.rand(1, heads, n // block, n // block, generator=g) >= sparsity

    def result(attention: object, dtype: torch.dtype) -> Tensor:
        if not backward:
            return attention(q.to(dtype), k.to(dtype), v.to(dtype))
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        return torch.stack(torch.autograd.grad(attention(*leaves), leaves, weight.to(dtype)))

    ours = lambda *a: block_sparse_attention(*a, block=block, mask=mask, impl="torch")
    pairs = mask.sum().item() * block**2
    return Case(
        op="block_sparse_attention" + ", gradients" * backward,
        shape=f"b=1 heads={heads} n={n} d={d} block={block} sparsity={sparsity}",
        ours={"torch": lambda: result(ours, torch.float32)},
        peers={"dense SDPA (all blocks)": lambda: result(F.scaled_dot_product_attention, torch.float32)},
        exact=lambda: result(ours, torch.float64),
        flops=(14.0 if backward else 4.0) * pairs * d,
        bytes=4.0 * (7 if backward else 4) * q.numel(),
    )
