"""Linear attention: LinFusion's and LiT's form against softmax attention and the unfused sums."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case, by_impl, on_gpu
from zoo.kernels.linear_attention import linear_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Launch what LinFusion launches, and packed images with a decoupled numerator, forward and backward."""
    q, k, v = (torch.zeros(2, 1024, 4, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    borders = torch.tensor([0, 500, 1024], dtype=torch.int32)
    for options in ({}, {"cu_seqlens": borders, "feature_map": "relu", "q2": q, "k2": k}):
        linear_attention(q, k, v, impl="triton", **options).sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """Softmax attention stands beside it for its time, not for its result."""
    b, heads, d = (4, 16, 64) if on_gpu() else (1, 8, 64)
    for n in (1024, 4096) if quick else (1024, 4096, 16384):
        q, k, v = (torch.randn(b, n, heads, d).transpose(1, 2) for _ in range(3))
        flops, size = 4.0 * b * heads * n * d * d, float(q.nbytes)
        yield Case(
            op="linear_attention",
            shape=f"b={b} heads={heads} n={n} d={d} elu1 mean",
            inputs=(q, k, v),
            ours=by_impl(attention),
            peers={"unfused": unfused, "dense SDPA": F.scaled_dot_product_attention},
            flops=flops,
            bytes=4 * size,
            trained=(3 * flops, 11 * size) if n == 4096 else None,  # backward: reads four, writes three
        )


def attention(impl: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As LinFusion has it."""
    return linear_attention(q, k, v, eps=1e-4, impl=impl)


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As LinFusion's module does it."""
    n = k.shape[2]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(2)[..., None] + 1e-4
    return q @ ((k * n**-0.5).mT @ (v * n**-0.5)) / z
