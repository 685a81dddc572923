"""Rounding to nearest inside GPU kernels, where the hardware or Triton's interpreter cuts digits off."""

import triton
import triton.language as tl

from zoo.kernels import chips

INTERPRETED = tl.constexpr(chips.INTERPRETED)


@triton.jit
def tf32(x: tl.tensor) -> tl.tensor:
    """Float32 to the nearest tf32: tensor cores cut the digits off, which shrinks every product."""
    near = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, near, x)  # the NaN of GPUs, all bits set, would become -0


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Float32 to the nearest of `dtype`; the interpreter's own cast to bf16 cuts digits off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, near, x)
    return x.to(dtype)
