"""The definition as a matrix for each axis, tap by tap; the oracle for the other implementations."""

import torch
from torch import Tensor

from .filters import band_size, signal_size


def forward(x: Tensor, bank: Tensor, ndim: int, mode: str) -> Tensor:
    y = x.double()[:, :, None]  # b c bands *sizes
    for axis in range(3, 3 + ndim):
        low, high = (_analysis(taps.tolist(), y.shape[axis], mode).to(y.device) for taps in bank[:2])
        y = torch.cat([_along(axis, low, y), _along(axis, high, y)], 2)
    return y.to(x.dtype)


def inverse(bands: Tensor, bank: Tensor, ndim: int, mode: str, size: tuple[int, ...]) -> Tensor:
    y = bands.double()
    for axis in range(2 + ndim, 2, -1):
        low, high = (_synthesis(taps.tolist(), y.shape[axis], mode).to(y.device) for taps in bank[2:])
        halves = y.chunk(2, 2)
        y = (_along(axis, low, halves[0]) + _along(axis, high, halves[1])).narrow(axis, 0, size[axis - 3])
    return y.squeeze(2).to(bands.dtype)


def _along(axis: int, matrix: Tensor, x: Tensor) -> Tensor:
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


def _analysis(taps: list[float], n: int, mode: str) -> Tensor:
    """Row k holds the weights of the samples in coefficient k: sum_j taps[j] extended[2 k + first - j]."""
    matrix = torch.zeros(band_size(n, len(taps), mode), n, dtype=torch.float64)
    first = len(taps) // 2 if mode == "periodization" else 1
    for k in range(len(matrix)):
        for j, tap in enumerate(taps):
            matrix[k] += tap * _sample(2 * k + first - j, n, mode)
    return matrix


def _synthesis(taps: list[float], n: int, mode: str) -> Tensor:
    """Column k holds the weights of coefficient k in the samples: taps[j] in sample 2 k + j - first."""
    size = signal_size(n, len(taps), mode)
    matrix = torch.zeros(size, n, dtype=torch.float64)
    first = len(taps) // 2 - 1 if mode == "periodization" else len(taps) - 2
    for k in range(n):
        for j, tap in enumerate(taps):
            m = 2 * k + j - first
            if mode == "periodization":
                matrix[m % size, k] += tap
            elif 0 <= m < size:
                matrix[m, k] += tap
    return matrix


def _sample(i: int, n: int, mode: str) -> Tensor:
    """Weights (n,) of the given samples in sample `i` of the signal extended without end."""
    if mode == "periodization":  # an odd signal repeats its last sample first
        return _unit(min(i % (n + n % 2), n - 1), n)
    if 0 <= i < n:
        return _unit(i, n)
    if mode == "zero":
        return torch.zeros(n, dtype=torch.float64)
    if mode == "periodic":
        return _unit(i % n, n)
    edge, outward = (0, -1) if i < 0 else (n - 1, 1)
    if mode == "constant" or (n == 1 and mode == "smooth"):
        return _unit(edge, n)
    if mode == "symmetric":
        return _sample(2 * edge + outward - i, n, mode)
    if mode == "antisymmetric":
        return -_sample(2 * edge + outward - i, n, mode)
    if mode == "reflect":
        return _sample(2 * edge - i, n, mode)
    if mode == "antireflect":
        return 2 * _unit(edge, n) - _sample(2 * edge - i, n, mode)
    steps = abs(i - edge)  # smooth: the straight line through the last two samples
    return (1 + steps) * _unit(edge, n) - steps * _unit(edge - outward, n)


def _unit(i: int, n: int) -> Tensor:
    unit = torch.zeros(n, dtype=torch.float64)
    unit[i] = 1
    return unit
