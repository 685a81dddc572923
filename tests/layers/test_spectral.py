import math

import pytest
import torch

from tests.helpers import error
from zoo.layers.spectral import HighPass, LowPass

EXACT = 1e-12  # float64


def waves(*cycles, size=(16, 24)):
    """Images of one wave each, that many cycles down and to the right."""
    y, x = (torch.arange(n, dtype=torch.float64) / n for n in size)
    return torch.stack([torch.cos(2 * math.pi * (u * y[:, None] + v * x)) for u, v in cycles])[:, None]


def test_waves_pass_on_their_side_of_the_cutoff():
    images = waves((0, 0), (1, 2), (4, 3), (8, 12))  # 0, 0.1, 0.28 and 0.71 cycles per pixel
    for cutoff, kept in ((0.05, 1), (0.2, 2), (0.5, 3), (1.0, 4)):
        passes = torch.arange(4).lt(kept).view(4, 1, 1, 1)
        assert error(LowPass(cutoff)(images), images * passes) <= EXACT
        assert error(HighPass(cutoff)(images) + images * passes, images) <= EXACT


@pytest.mark.parametrize("size", [(7, 9), (8, 5), (1, 6)], ids=str)
def test_low_and_high_add_up_to_the_image(size):
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    low, high = LowPass(0.2)(images), HighPass(0.2)(images)
    assert error(low + high, images) <= EXACT
    assert error(LowPass(0.2)(low), low) <= EXACT
    assert (low * high).sum().abs() <= 1e-10


def test_gradient_is_the_filter_itself():
    images, weight = torch.randn(2, 2, 3, 7, 10, dtype=torch.float64).unbind()
    module = HighPass(0.3)
    (gradient,) = torch.autograd.grad((module(images.requires_grad_()) * weight).sum(), images)
    assert error(gradient, module(weight)) <= EXACT


def test_dtype_is_kept_also_under_autocast():
    images = torch.randn(1, 3, 8, 8).bfloat16()
    expected = LowPass(0.3)(images.float()).bfloat16()
    assert torch.equal(LowPass(0.3)(images), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LowPass(0.3)(images), expected)


def test_printed_module_names_its_cutoff_and_none_below_zero_is_taken():
    assert str(HighPass(0.25)) == "HighPass(cutoff=0.25)"
    with pytest.raises(ValueError, match="HighPass: cutoff must be above 0 cycles per pixel, got 0"):
        HighPass(0)
