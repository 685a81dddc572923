"""What GPU kernels round, next to what torch rounds, in Triton's interpreter where there is no GPU."""

import pytest
import torch
import triton
import triton.language as tl

from tests.helpers import DEVICE
from zoo.kernels.rounding import narrow, tf32

NANS = [0x7FFFFFFF, 0x7FC00000, -1]  # of GPUs, of CPUs, with a sign


@triton.jit
def _narrow_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, narrow(tl.load(x_ptr + at), y_ptr.dtype.element_ty))


@triton.jit
def _tf32_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tf32(tl.load(x_ptr + at)))


def given():
    """Numbers of many sizes, halves between neighbours of bf16 and of tf32, infinities and NaN."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 38, 256)
    bits = x.view(torch.int32)
    bits[:32] = bits[:32] & -0x10000 | 0x8000
    bits[32:64] = bits[32:64] & -0x2000 | 0x1000
    x[64:66] = torch.tensor([torch.inf, -torch.inf])
    bits[66:69] = torch.tensor(NANS, dtype=torch.int64).to(torch.int32)
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_narrow_rounds_as_torch_does(dtype):
    x = given()
    y = torch.empty(256, dtype=dtype, device=DEVICE)
    _narrow_kernel[(1,)](x, y, N=256)
    assert torch.equal(y.nan_to_num(7.0, 8.0, 9.0), x.to(dtype).nan_to_num(7.0, 8.0, 9.0))


def test_tf32_is_the_nearest_number_of_ten_bits_and_nan_stays_nan():
    x = given()
    y = torch.empty_like(x)
    _tf32_kernel[(1,)](x, y, N=256)
    assert torch.equal(y.isnan(), x.isnan())
    normal = x.isfinite() & (x.abs() < 3e38)
    assert not (y[normal].view(torch.int32) & 0x1FFF).any()
    assert ((y[normal].double() / x[normal].double() - 1).abs() <= 2**-11).all()
    assert torch.equal(y[64:66], x[64:66])
