"""Scans as vision models have them: two directions, and one from a state, both trained."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
from zoo.kernels.selective_scan import selective_scan


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Two orders that share tokens with a gate and a plain scan without one; a quarter of `head_dim` states."""
    b, e, n, s = 1, 2 * head_dim, 128, head_dim // 4
    tokens = [torch.randn(b, e, n, dtype=dtype, requires_grad=True) for _ in range(3)]
    A, D, bias = (torch.randn(shape, requires_grad=True) for shape in ((e, s), (e,), (e,)))
    weights = [torch.randn(b, 2, s, n, dtype=dtype, requires_grad=True) for _ in range(2)]
    orders = torch.stack([torch.arange(n), torch.arange(n).flip(0)])
    halves = [x[:, : e // 2] for x in tokens]
    two = selective_scan(
        halves[0], tokens[1], A, *weights, D, halves[2], bias, delta_softplus=True, orders=orders, impl="triton"
    )
    weights = [x[:, 0] for x in weights]
    state = torch.randn(b, e, s, requires_grad=True)
    one, last = selective_scan(
        *tokens[:2], A, *weights, D, None, bias, True, initial_state=state, return_state=True, impl="triton"
    )
    (two.sum() + one.sum() + last.sum()).backward()


def timed(quick: bool) -> Iterator[Case]:
    """The size that scans are judged by, forward; and with the backward, shorter for the sake of the published form."""
    for n, train in ((1024, False), (1024, True)) if quick else ((1024, False), (4096, False), (1024, True)):
        e, s = 384, 16
        floats = [torch.randn(1, e, n), torch.randn(1, e, n) - 3, -torch.arange(1.0, s + 1).repeat(e, 1)]
        floats += [torch.randn(1, s, n), torch.randn(1, s, n), torch.randn(e), torch.randn(1, e, n), torch.zeros(e)]
        floats = [x.requires_grad_(train) for x in floats]
        calls = {"torch": _ours, "loop over b e n s buffers": published, "lean loop": lean}
        calls = {name: _trained(call, floats) if train else _bound(call, floats) for name, call in calls.items()}
        if train:
            del calls["lean loop"]  # works in place
        exact = [x.detach().double().requires_grad_(train) for x in floats]
        yield Case(
            "selective_scan, backward too" if train else "selective_scan",
            f"b=1 e={e} n={n} s={s}",
            {"torch": calls.pop("torch")},
            calls,
            _trained(_ours, exact) if train else _bound(_ours, exact),
            flops=(19.0 if train else 6.0) * e * n * s,
            bytes=4.0 * n * ((7 if train else 4) * e + (4 if train else 2) * s),
        )


def published(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """All decays and inputs (b, e, n, s) first, then a loop: what the published code runs without its own kernel."""
    dt = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("ben,es->bens", dt, A))
    drive = torch.einsum("ben,bsn,ben->bens", dt, B, u)
    h, ys = torch.zeros_like(decay[:, :, 0]), []
    for i in range(u.shape[2]):
        h = decay[:, :, i] * h + drive[:, :, i]
        ys.append(torch.einsum("bes,bs->be", h, C[:, :, i]))
    return (torch.stack(ys, 2) + u * D[:, None]) * F.silu(z)


def lean(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor) -> Tensor:
    """A loop that updates one state in place and has no buffers of four axes."""
    dt = F.softplus(delta + delta_bias[:, None]).permute(2, 0, 1).contiguous()  # n b e
    drive = dt * u.permute(2, 0, 1)
    B, C = (x.permute(2, 0, 1).contiguous() for x in (B, C))  # n b s
    h = u.new_zeros(len(u), *A.shape)
    decay, y = torch.empty_like(h), torch.empty_like(dt)
    for i in range(len(dt)):
        torch.mul(dt[i, :, :, None], A, out=decay).exp_()
        h.mul_(decay).addcmul_(drive[i, :, :, None], B[i, :, None])
        torch.bmm(h, C[i, :, :, None], out=y[i, :, :, None])
    return (y.permute(1, 2, 0) + u * D[:, None]) * F.silu(z)


def _ours(*floats: Tensor) -> Tensor:
    return selective_scan(*floats, delta_softplus=True)


def _bound(call: Callable[..., Tensor], floats: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: call(*floats)


def _trained(call: Callable[..., Tensor], floats: list[Tensor]) -> Callable[[], Tensor]:
    """All gradients in one row, each relative to its own size in float32 or float64."""

    def run() -> Tensor:
        grads = torch.autograd.grad(call(*floats).square().sum(), floats)
        return torch.cat([g.flatten() / g.abs().max() for g in grads])

    return run
