"""How a decay that is given by token becomes one by block."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Below it exp is 0 in float64 too, and sums over stretches of tokens stay finite.
_LEAST = -1000.0


def by_block(log_decay: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """The sum over a block at its first token and 0 at its others; (b, heads, n, 1 or d), finite, of that dtype.

    Sums over the tokens after j and up to i are then those over the blocks after that of j and up to that of i.
    """
    log_decay = log_decay.to(dtype).clamp(min=_LEAST)
    if block == 1:
        return log_decay
    n = log_decay.shape[2]
    blocks = F.pad(log_decay, (0, 0, 0, -n % block)).unflatten(2, (-1, block))  # b heads blocks block d
    return F.pad(blocks.sum(3, keepdim=True).clamp(min=_LEAST), (0, 0, 0, block - 1)).flatten(2, 3)[:, :, :n]
