"""Measures that several test files share."""

import torch
from torch import Tensor


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest magnitude expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return 0.0
    assert torch.isfinite(actual).all()
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-300)).item()


def assert_within_budget(actual: Tensor, dense: Tensor, exact: Tensor, factor: float = 1.5) -> None:
    """The error of `actual` is at most `factor` times that of a plain `dense` run at the same precision."""
    budget = factor * error(dense, exact)
    assert error(actual, exact) <= budget, (error(actual, exact), budget)
