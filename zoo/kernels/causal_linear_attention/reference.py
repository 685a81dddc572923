"""The definition, one block after the other; the oracle for the other implementations."""

import torch
from torch import Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, block: int, initial_state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    state = initial_state.double()  # b heads d e
    outs = [q[:, :, :0].double() @ state]
    for start in range(0, q.shape[2], block):
        span = slice(start, start + block)
        if log_decay is not None:
            state = log_decay[:, :, span].double().sum(2).exp()[..., None] * state
        state = state + k[:, :, span].double().mT @ v[:, :, span].double()
        outs.append(q[:, :, span].double() @ state)
    return torch.cat(outs, 2).to(dtype), state.to(torch.promote_types(q.dtype, torch.float32))
