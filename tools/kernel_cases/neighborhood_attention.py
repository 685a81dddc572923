"""Neighbourhood attention: what is compiled, and what is timed."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
from zoo.kernels.neighborhood_attention import neighborhood_attention


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """A map with a bias and extra keys, a circle as CLEAR has it, and frames, each forward and backward."""
    for grid, extras, biased, options in (
        ((32, 32), 16, True, {"kernel": 7, "dilation": 2}),
        ((32, 32), 16, False, {"radius": 8, "shape": "circle", "edge": "truncate"}),
        ((8, 16, 16), 0, False, {"kernel": (3, 7, 7), "causal": (True, False, False)}),
    ):
        n = torch.Size(grid).numel()
        token = lambda count: torch.zeros(1, count, 2, head_dim, dtype=dtype).transpose(1, 2).requires_grad_()
        extra_kv = (token(extras), token(extras)) if extras else None
        bias = torch.zeros(2, 13, 13, requires_grad=True) if biased else None
        y = neighborhood_attention(
            token(n), token(n), token(n), grid=grid, extra_kv=extra_kv, bias=bias, impl="triton", **options
        )
        y.sum().backward()


def timed(quick: bool) -> Iterator[Case]:
    """Circles of CLEAR with and without text, and boxes on maps and frames."""
    for grid, extras, options in _shapes(quick):
        yield _case(grid, extras, options)


def _shapes(quick: bool) -> Iterator[tuple[tuple[int, ...], int, dict]]:
    circle = {"shape": "circle", "edge": "truncate"}
    yield (64, 64), 0, {"radius": 8, **circle}
    if not quick:
        yield (64, 64), 512, {"radius": 16, **circle}
        yield (64, 64), 0, {"kernel": 13}
        yield (64, 64), 0, {"kernel": 7, "dilation": 4}
        yield (16, 16, 16), 0, {"kernel": 5}


def _case(grid: tuple[int, ...], extras: int, options: dict) -> Case:
    heads, d, n = 8, 64, torch.Size(grid).numel()
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, heads, d, generator=g).transpose(1, 2) for _ in range(3))
    more = tuple(torch.randn(1, extras, heads, d, generator=g).transpose(1, 2) for _ in range(2))

    def ours(impl: str, *tensors: Tensor) -> Tensor:
        queries, keys, values, *rest = tensors
        extra_kv = tuple(rest) if extras else None
        return neighborhood_attention(queries, keys, values, grid=grid, extra_kv=extra_kv, impl=impl, **options)

    zero = torch.zeros(1, 1, n, 1)
    seen = neighborhood_attention(zero, zero, zero, grid=grid, return_lse=True, **options)[1].exp().sum().item()
    peers = {
        # Sees every key: another result, but the time that attention takes without being local.
        "dense SDPA, no mask": lambda: F.scaled_dot_product_attention(q, *_all(k, v, more)),
    }
    if "radius" in options:
        mask = F.pad(_circle(grid, options["radius"]), (0, extras), value=True)
        peers["dense SDPA"] = lambda: F.scaled_dot_product_attention(q, *_all(k, v, more), attn_mask=mask)
    told = ", ".join(f"{name} {value}" for name, value in options.items() if name != "edge")
    return Case(
        op="neighborhood_attention",
        shape=f"{'x'.join(map(str, grid))}, {told}, {extras} extra keys, {heads} heads x {d}",
        ours={"torch": lambda: ours("torch", q, k, v, *more)},
        peers=peers,
        exact=lambda: ours("torch", *(t.double() for t in (q, k, v, *more))),
        flops=4.0 * heads * d * (seen + n * extras),
        bytes=4.0 * heads * d * (4 * n + 2 * extras),
    )


def _all(k: Tensor, v: Tensor, more: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.cat(pair, 2) for pair in zip((k, v), more, strict=True)]


def _circle(grid: tuple[int, ...], radius: int) -> Tensor:
    y, x = (t.flatten() for t in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return (y[:, None] - y).square() + (x[:, None] - x).square() < radius**2  # n n
