"""Neighbourhood attention: what is compiled, and what is timed."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Call, Case, by_impl, flex, installed, on_gpu
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
    circle = {"shape": "circle", "edge": "truncate"}
    yield _case((64, 64), 0, {"radius": 8, **circle})
    if not quick:
        yield _case((64, 64), 512, {"radius": 16, **circle})
        yield _case((80, 80) if on_gpu() else (64, 64), 0, {"kernel": 13})
        yield _case((64, 64), 0, {"kernel": 7, "dilation": 4})
        yield _case((16, 32, 32) if on_gpu() else (16, 16, 16), 0, {"kernel": 5})


def _case(grid: tuple[int, ...], extras: int, options: dict) -> Case:
    b, heads, d, n = 4 if on_gpu() else 1, 8, 64, torch.Size(grid).numel()
    q, k, v = (torch.randn(b, n, heads, d).transpose(1, 2) for _ in range(3))
    more = tuple(torch.randn(b, extras, heads, d).transpose(1, 2) for _ in range(2 if extras else 0))

    def ours(impl: str, q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> Tensor:
        return neighborhood_attention(q, k, v, grid=grid, extra_kv=extra or None, impl=impl, **options)

    def dense(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, *_all(k, v, extra), attn_mask=mask)

    sees = _rule(grid, options)
    flexible = flex(sees, n, n + extras)
    places, keys = torch.arange(n)[:, None], torch.arange(n + extras)
    zero = torch.zeros((), dtype=torch.int64)
    mask = sees(zero, zero, places, keys)  # n m
    pairs = b * heads * int(mask.sum())
    told = ", ".join(f"{name} {value}" for name, value in options.items() if name != "edge")
    return Case(
        op="neighborhood_attention",
        shape=f"{'x'.join(map(str, grid))}, {told}, {extras} extra keys, b={b} heads={heads} d={d}",
        inputs=(q, k, v, *more),
        ours=by_impl(ours),
        peers={
            "dense SDPA, mask": partial(dense, mask=mask),
            # Sees every key: another result, but the time that attention takes without being local.
            "dense SDPA, no mask": dense,
            "flex_attention": lambda q, k, v, *extra: flexible(q, *_all(k, v, extra)),
            **_natten(grid, extras, options),
        },
        flops=4.0 * d * pairs,
        bytes=4.0 * q.nbytes + sum(t.nbytes for t in more),
        trained=(14.0 * d * pairs, 11.0 * q.nbytes) if not extras else None,
        untrained=frozenset() if on_gpu() else frozenset(["flex_attention"]),
    )


def _all(k: Tensor, v: Tensor, more: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.cat(pair, 2) for pair in zip((k, v), more, strict=True)] if more else [k, v]


def _rule(grid: tuple[int, ...], options: dict) -> Callable[..., Tensor]:
    """Which token sees which, as a mask_mod of flex_attention; keys beyond the grid are seen by all."""
    n = torch.Size(grid).numel()
    lines = [torch.arange(side).view(-1, *[1] * (len(grid) - 1 - axis)) for axis, side in enumerate(grid)]
    places = [line.expand(grid).flatten() for line in lines]
    if "kernel" in options:
        kernel, apart = options["kernel"], options.get("dilation", 1)
        firsts = []  # of the keys of each token: the border moves a window inwards, tokens of its own comb only
        for place, side in zip(places, grid, strict=True):
            step, comb = place // apart, place % apart
            held = (side - 1 - comb) // apart + 1
            firsts.append(((step - kernel // 2).clamp(min=0).minimum(held - kernel), comb))

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        inside = j.clamp(max=n - 1)
        if "radius" in options:
            near = sum((place[i] - place[inside]).square() for place in places) < options["radius"] ** 2
        else:
            near = j >= 0
            for place, (first, comb) in zip(places, firsts, strict=True):
                step = place[inside] // apart - first[i]
                near = near & (place[inside] % apart == comb[i]) & (step >= 0) & (step < kernel)
        return near | (j >= n)

    return sees


def _natten(grid: tuple[int, ...], extras: int, options: dict) -> dict[str, Call]:
    natten = installed("natten")
    if natten is None or extras or "kernel" not in options:
        return {}
    op = {2: natten.na2d, 3: natten.na3d}[len(grid)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        laid = [t.transpose(1, 2).unflatten(1, grid) for t in (q, k, v)]  # b t h w heads d
        y = op(*laid, kernel_size=options["kernel"], dilation=options.get("dilation", 1))
        return y.flatten(1, len(grid)).transpose(1, 2)

    return {"natten": call}
