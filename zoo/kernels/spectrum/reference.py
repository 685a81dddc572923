"""The definition as one matrix for each axis; the oracle for the other implementation."""

import math

import torch
from torch import Tensor


def forward(x: Tensor, norm: str) -> Tensor:
    h, w = x.shape[-2:]
    z = _factor(h, w, norm) * _waves(h, x) @ x.to(torch.complex128) @ _waves(w, x)  # ... h w
    return z[..., : w // 2 + 1].to(torch.promote_types(x.dtype, torch.complex64))


def inverse(z: Tensor, size: tuple[int, int], norm: str) -> Tensor:
    h, w = size
    columns = torch.arange(w, device=z.device)
    half = z.to(torch.complex128)
    # Columns beyond the middle are conjugates, of which the real part of the sum is the same; so twice the half plane.
    twice = torch.where((columns == 0) | (2 * columns == w), 1.0, 2.0)[: w // 2 + 1]
    rows = _waves(h, z).conj() @ half
    y = (rows * twice @ _waves(w, z).conj()[: w // 2 + 1]).real  # ... h w
    return (y / (h * w * _factor(h, w, norm))).to(z.real.dtype)


def _factor(h: int, w: int, norm: str) -> float:
    return 1.0 if norm == "backward" else 1 / math.sqrt(h * w)


def _waves(n: int, like: Tensor) -> Tensor:
    """exp(-2 pi i u y / n) for all u and y."""
    steps = torch.arange(n, dtype=torch.float64, device=like.device)
    angle = -2 * math.pi * (torch.outer(steps, steps) % n) / n
    return torch.polar(torch.ones_like(angle), angle)
