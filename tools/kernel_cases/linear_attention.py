"""Linear attention: LinFusion's and LiT's form against softmax attention and the unfused sums."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
from zoo.kernels.linear_attention import linear_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Launch what LinFusion launches, and packed images with a decoupled numerator, forward and backward."""
    q, k, v = (torch.zeros(2, 1024, 4, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    borders = torch.tensor([0, 500, 1024], dtype=torch.int32)
    for options in ({}, {"cu_seqlens": borders, "feature_map": "relu", "q2": q, "k2": k}):
        linear_attention(q, k, v, impl="triton", **options).sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """8 heads of 64; softmax attention stands beside it for its time, not for its result."""
    heads, d = 8, 64
    for n in (1024, 4096) if quick else (1024, 4096, 16384):
        q, k, v = (torch.randn(1, n, heads, d).transpose(1, 2).requires_grad_() for _ in range(3))
        ours = lambda impl, q=q, k=k, v=v: linear_attention(q, k, v, eps=1e-4, impl=impl)
        plain = lambda q=q, k=k, v=v: unfused(q, k, v)
        peers = {"unfused": plain, "dense SDPA": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)}
        exact = lambda q=q, k=k, v=v: linear_attention(q.double(), k.double(), v.double(), eps=1e-4, impl="reference")
        yield Case(
            "linear_attention",
            f"b=1 heads={heads} n={n} d={d} elu1 mean",
            {"torch": lambda ours=ours: ours("torch")},
            peers,
            exact,
            flops=4.0 * heads * n * d * d,
            bytes=4.0 * q.numel() * q.element_size(),
        )


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As LinFusion's module does it."""
    n = k.shape[2]
    q, k = F.elu(q) + 1, F.elu(k) + 1
    z = q @ k.mean(2)[..., None] + 1e-4
    return q @ ((k * n**-0.5).mT @ (v * n**-0.5)) / z
