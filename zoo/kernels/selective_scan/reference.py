"""The definition, one step after the other; the oracle for the other two."""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    orders: Tensor | None,
    softplus: bool,
    chunk: int | None,  # a matter of speed and memory alone
) -> tuple[Tensor, Tensor]:
    b, r, d, n = delta.shape
    wide, paths = u.double(), torch.arange(r, device=u.device)
    dt = delta.double() if delta_bias is None else delta.double() + delta_bias.double()[..., None]
    dt = F.softplus(dt, threshold=20) if softplus else dt  # b r d n
    tokens = torch.arange(n, device=u.device).expand(r, n) if orders is None else orders  # r n
    decay, drive, weigh = (t.double() for t in (A, B, C))
    h = dt.new_zeros(b, r, d, A.shape[2]) if initial_state is None else initial_state.double()
    ys = []
    for i in range(n):
        read = lambda x, i=i: x[:, paths, :, tokens[:, i]].transpose(0, 1)  # b r *
        step, now = read(dt)[..., None], read(wide)[..., None]  # b r d 1
        b_t, c_t = (x if x.ndim == 3 else read(x)[:, :, None] for x in (drive, weigh))  # r d s, or b r 1 s
        h = (step * decay).exp() * h + step * now * b_t  # b r d s
        ys.append((c_t * h).sum(-1))
    y = torch.stack(ys) if ys else dt.new_zeros(0, b, r, d)  # n b r d, in the order of visits
    y = y[tokens.argsort(1).T, :, paths].permute(2, 1, 3, 0)  # b r d n
    if D is not None:
        y = y + D.double()[..., None] * wide
    if z is not None:
        y = y * F.silu(z.double())
    return y.to(u.dtype), h.to(torch.promote_types(u.dtype, torch.float32))
