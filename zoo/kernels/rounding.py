"""Rounding to nearest inside GPU kernels, where the hardware or Triton's interpreter cuts digits off.

`dot`, `load` and `store` are for kernels that compute in float32 whatever the dtype of their tokens.
"""

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


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Float32 tiles acc + a b; PRECISION "tf32" or "ieee"."""
    if PRECISION == "tf32":
        a, b = tf32(a), tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load(
    ptr: tl.tensor,
    rows: tl.tensor,
    along_rows: tl.tensor,
    columns: tl.tensor,
    along_columns: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """A float32 tile, zero outside; strides may exceed 2^31."""
    places = rows[:, None].to(tl.int64) * along_rows + columns[None, :].to(tl.int64) * along_columns
    return tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(
    ptr: tl.tensor,
    x: tl.tensor,
    rows: tl.tensor,
    along_rows: tl.tensor,
    columns: tl.tensor,
    along_columns: tl.tensor,
    inside: tl.tensor,
) -> None:
    """Round a float32 tile to the dtype behind `ptr`."""
    places = rows[:, None].to(tl.int64) * along_rows + columns[None, :].to(tl.int64) * along_columns
    tl.store(ptr + places, narrow(x, ptr.dtype.element_ty), mask=inside)
