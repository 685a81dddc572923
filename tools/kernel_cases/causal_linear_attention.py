"""Causal linear attention without decay, with one by token and one by channel."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Call, Case, by_impl, installed, on_gpu
from zoo.kernels.causal_linear_attention import causal_linear_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Launch what retention, GLA and a model of video frames launch, forward and backward."""
    q, k, v = (torch.zeros(2, 1024, 4, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    by_channel = torch.zeros(2, 4, 1024, head_dim, requires_grad=True)
    by_token = torch.zeros(2, 4, 1024, requires_grad=True)
    for options in ({"log_decay": by_channel}, {"log_decay": by_token}, {"block": 256}):
        causal_linear_attention(q, k, v, impl="triton", **options).sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """Softmax attention stands beside it for its time, not for its result."""
    b, heads, d = (4, 16, 64) if on_gpu() else (1, 8, 64)
    n = 1024 if quick else 4096 if on_gpu() else 2048
    for name, shape in (("none", None), ("token", (b, heads, n)), ("channel", (b, heads, n, d))):
        q, k, v = (torch.randn(b, n, heads, d).transpose(1, 2) for _ in range(3))
        decay = [] if shape is None else [-0.1 * torch.rand(shape, dtype=torch.float32)]
        peers: dict[str, Call] = {"dense SDPA": causal_softmax} | _fla(name)
        if name != "channel":
            peers["dense masked"] = masked
        flops, size = 2.0 * b * heads * n * d * (2 * d + 64), float(q.nbytes)
        more = sum(t.nbytes for t in decay)
        yield Case(
            op="causal_linear_attention",
            shape=f"b={b} heads={heads} n={n} d={d} decay={name}",
            inputs=(q, k, v, *decay),
            ours=by_impl(attention),
            peers=peers,
            flops=flops,
            bytes=4 * size + more,
            trained=(3 * flops, 11 * size + 3 * more),
        )


def attention(impl: str, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """Ours."""
    return causal_linear_attention(q, k, v, log_decay=decay, impl=impl)


def masked(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """All pairs of tokens."""
    weights = (q @ k.mT).tril()
    if decay is not None:
        total = decay.double().cumsum(-1)
        weights = weights * (total[..., :, None] - total[..., None, :]).clamp(max=0).to(q.dtype).exp()
    return weights @ v


def causal_softmax(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None = None) -> Tensor:
    """Another result."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) + (0 if decay is None else 0 * decay.sum())


def _fla(decay: str) -> dict[str, Call]:
    gla, simple = installed("fla.ops.gla"), installed("fla.ops.simple_gla")
    if not (gla and simple):
        return {}
    chunk = gla.chunk_gla if decay == "channel" else simple.chunk_simple_gla

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        turned = [t.transpose(1, 2) for t in (q, k, v, *more)]  # b n heads d
        return chunk(*turned, scale=1.0)[0].transpose(1, 2)

    return {"fla": call}
