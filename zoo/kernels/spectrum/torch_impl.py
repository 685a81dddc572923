"""The fast transform of torch; autograd does the rest."""

import torch
from torch import Tensor


def forward(x: Tensor, norm: str) -> Tensor:
    if not x.numel():  # refused by some libraries below torch
        return x.to(torch.promote_types(x.dtype, torch.complex64))[..., : x.shape[-1] // 2 + 1]
    return torch.fft.rfft2(x, norm=norm)


def inverse(z: Tensor, size: tuple[int, int], norm: str) -> Tensor:
    if not z.numel():
        return z.real.new_empty(*z.shape[:-2], *size)
    return torch.fft.irfft2(z, s=size, norm=norm)
