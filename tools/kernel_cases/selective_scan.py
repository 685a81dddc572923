"""Scans as vision models have them: two directions, and one from a state, both trained."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Call, Case, by_impl, installed, on_gpu
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
    """The size that scans are judged by; trained at a quarter of it, for the sake of the loops."""
    b, e, s = 8 if on_gpu() else 1, 384, 16
    for n in (1024,) if quick else (1024, 4096):
        A, D, bias = -torch.arange(1.0, s + 1).repeat(e, 1).float(), torch.randn(e).float(), torch.zeros(e).float()
        u, delta, z = (torch.randn(b, e, n) for _ in range(3))
        B, C = (torch.randn(b, s, n) for _ in range(2))
        flops, token = 6.0 * b * e * n * s, b * n * u.element_size()
        yield Case(
            op="selective_scan",
            shape=f"b={b} e={e} n={n} s={s}",
            inputs=(u, delta - 3, A, B, C, D, z, bias),
            ours=by_impl(lambda impl, *inputs: selective_scan(*inputs, delta_softplus=True, impl=impl)),
            peers={"loop over b e n s buffers": published, "lean loop": lean} | _mamba(),
            flops=flops,
            bytes=token * (4.0 * e + 2 * s),
            trained=(3 * flops, token * (11.0 * e + 6 * s)) if n == 1024 else None,
            untrained=frozenset(["lean loop"]),  # works in place
        )


def published(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    """All decays and inputs (b, e, n, s) first, then a loop: what the published code runs without its own kernel."""
    u, delta, B, C, z = (x.float() for x in (u, delta, B, C, z))
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
    u, delta, B, C, z = (x.float() for x in (u, delta, B, C, z))
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


def _mamba() -> dict[str, Call]:
    interface = installed("mamba_ssm.ops.selective_scan_interface")
    scan = interface and interface.selective_scan_fn
    return {"mamba-ssm": lambda *inputs: scan(*inputs, delta_softplus=True)} if scan else {}
