"""Causal linear attention without decay, with one by token and one by channel."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
from zoo.kernels.causal_linear_attention import causal_linear_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Launch what retention, GLA and a model of video frames launch, forward and backward."""
    q, k, v = (torch.zeros(2, 1024, 4, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    by_channel = torch.zeros(2, 4, 1024, head_dim, requires_grad=True)
    by_token = torch.zeros(2, 4, 1024, requires_grad=True)
    for options in ({"log_decay": by_channel}, {"log_decay": by_token}, {"block": 256}):
        causal_linear_attention(q, k, v, impl="triton", **options).sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """8 heads of 64; softmax attention stands beside it for its time, not for its result."""
    heads, n, d = 8, 1024 if quick else 2048, 64
    q, k, v = (torch.randn(1, n, heads, d).transpose(1, 2).requires_grad_() for _ in range(3))
    decays = {"none": None, "token": -0.1 * torch.rand(1, heads, n), "channel": -0.1 * torch.rand(1, heads, n, d)}
    for name, decay in decays.items():

        def ours(impl: str = "torch", wide: bool = False, decay: Tensor | None = decay) -> Tensor:
            tokens = [t.double() if wide else t for t in (q, k, v)]
            return causal_linear_attention(*tokens, log_decay=decay, impl=impl)

        def dense(decay: Tensor | None = decay) -> Tensor:
            weights = (q @ k.mT).tril()
            if decay is not None:
                total = decay.double().cumsum(-1)
                weights = weights * (total[..., :, None] - total[..., None, :]).clamp(max=0).float().exp()
            return weights @ v

        peers = {"dense SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
        yield Case(
            "causal_linear_attention",
            f"b=1 heads={heads} n={n} d={d} decay={name}",
            {"torch": ours},
            peers if name == "channel" else {"dense masked": dense, **peers},
            lambda ours=ours: ours("reference", True),
            flops=2.0 * heads * n * d * (2 * d + 64),
            bytes=4.0 * q.numel() * q.element_size(),
        )
