"""Tiles of coefficients or samples, each summed up from what it needs, read where it lies.

A pass transforms the last axis, the one before or both at once. Short filters take two axes in one pass, as what
neighbours share is in the cache; longer ones go axis by axis, with float32 between. What lies beyond the ends is looked
up in a table of indices, one an axis; modes that extrapolate fill a larger copy first. The backward of either direction
is the other one. Registered as `zoo::dwt_triton_analysis` and `zoo::dwt_triton_synthesis`.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from zoo.kernels.chips import tuned
from zoo.kernels.rounding import narrow

from .ends import WEIGHTED, before, fill, fold_into, inner, sources
from .filters import band_size, signal_size
from .tuning import TILES

_TOGETHER = 8  # taps of the longest filter that takes two axes in one pass: 16 reads a sample


def forward(x: Tensor, bank: Tensor, ndim: int, mode: str) -> Tensor:
    return _analysis(x, _widen(bank[:2], x), mode)


def inverse(bands: Tensor, bank: Tensor, ndim: int, mode: str, size: tuple[int, ...]) -> Tensor:
    ends = "periodization" if mode == "periodization" else "zero"
    even = [signal_size(n, bank.shape[1], mode) for n in bands.shape[3:]]
    y = _synthesis(bands, _widen(bank[2:].flip(1), bands), ends, even)
    return y[(..., *(slice(n) for n in size))]


def _widen(taps: Tensor, x: Tensor) -> Tensor:
    return taps.to(x.device, torch.promote_types(x.dtype, torch.float32))


@triton.jit
def _tile(rows, columns, R: tl.constexpr, C: tl.constexpr):
    """Rows and columns of this program's tile, and its plane."""
    across = tl.cdiv(columns, C)
    tiles = tl.cdiv(rows, R) * across
    tile = tl.program_id(0) % tiles
    return tile // across * R + tl.arange(0, R), tile % across * C + tl.arange(0, C), tl.program_id(0) // tiles


@triton.jit
def _plane(plane, n1, n2, s0, s1, s2):
    """Offset of plane (i, j, l) of (n0, n1, n2)."""
    plane = plane.to(tl.int64)
    return plane // (n1 * n2) * s0 + plane // n2 % n1 * s1 + plane % n2 * s2


@triton.jit
def _analysis_kernel(
    x_ptr, y_ptr, taps_ptr, row_ptr, column_ptr, n1, n2, rows, columns,
    x0, x1, x2, x_row, x_column, y0, y1, y2, y_band_c, y_band_r, y_row, y_column,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """y[k, l] = sum_ij taps[i] taps[j] x[row[2 k + L - 1 - i], column[2 l + L - 1 - j]]; one tap leaves an axis."""
    r, c, plane = _tile(rows, columns, R, C)
    x_ptr += _plane(plane, n1, n2, x0, x1, x2)
    y_ptr += _plane(plane, n1, n2, y0, y1, y2)
    in_rows, in_columns = r < rows, c < columns
    row, column = tl.where(in_rows, r, -1), tl.where(in_columns, c, -1)
    wide = taps_ptr.dtype.element_ty
    approx = tl.zeros((R, C), wide)
    horizontal, vertical, diagonal = approx, approx, approx
    for i in range(ROW_TAPS):
        if ROW_TAPS > 1:
            row = tl.load(row_ptr + 2 * r + ROW_TAPS - 1 - i, mask=in_rows, other=-1)
        low = tl.zeros((R, C), wide)
        high = low
        for j in range(COLUMN_TAPS):
            if COLUMN_TAPS > 1:
                column = tl.load(column_ptr + 2 * c + COLUMN_TAPS - 1 - j, mask=in_columns, other=-1)
            given = (row >= 0)[:, None] & (column >= 0)[None]
            place = row.to(tl.int64)[:, None] * x_row + column.to(tl.int64)[None] * x_column
            x = tl.load(x_ptr + place, mask=given, other=0.0).to(wide)
            if COLUMN_TAPS > 1:
                low += tl.load(taps_ptr + j) * x
                high += tl.load(taps_ptr + COLUMN_TAPS + j) * x
            else:
                low += x
        if ROW_TAPS > 1:
            first, second = tl.load(taps_ptr + i), tl.load(taps_ptr + ROW_TAPS + i)
            approx += first * low
            horizontal += second * low
            vertical += first * high
            diagonal += second * high
        else:
            approx += low
            vertical += high
    dtype = y_ptr.dtype.element_ty
    y_ptr += r.to(tl.int64)[:, None] * y_row + c.to(tl.int64)[None] * y_column
    inside = in_rows[:, None] & in_columns[None]
    tl.store(y_ptr, narrow(approx, dtype), mask=inside)
    if ROW_TAPS > 1:
        tl.store(y_ptr + y_band_r, narrow(horizontal, dtype), mask=inside)
    if COLUMN_TAPS > 1:
        tl.store(y_ptr + y_band_c, narrow(vertical, dtype), mask=inside)
        if ROW_TAPS > 1:
            tl.store(y_ptr + y_band_c + y_band_r, narrow(diagonal, dtype), mask=inside)


@triton.jit
def _synthesis_kernel(
    y_ptr, x_ptr, taps_ptr, n1, n2, first_row, first_column, x_rows, x_columns, y_rows, y_columns,
    y0, y1, y2, y_band_c, y_band_r, y_row, y_column, x0, x1, x2, x_row, x_column,
    ROW_TAPS: tl.constexpr, COLUMN_TAPS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """x[2 s + q] = sum_t,bands taps[L - 1 - q - 2 t] y[s - t] along each axis of more than one tap.

    The given samples of the result begin at `first`; s counts pairs of samples, or samples of an axis that is left.
    """
    ROWS: tl.constexpr = 1 + (ROW_TAPS > 1)  # bands, and samples for one s
    COLUMNS: tl.constexpr = 1 + (COLUMN_TAPS > 1)
    lead_r, lead_c = first_row // ROWS, first_column // COLUMNS
    r, c, plane = _tile(
        (first_row + x_rows - 1) // ROWS + 1 - lead_r, (first_column + x_columns - 1) // COLUMNS + 1 - lead_c, R, C
    )
    r += lead_r
    c += lead_c
    x_ptr += _plane(plane, n1, n2, x0, x1, x2)
    y_ptr += _plane(plane, n1, n2, y0, y1, y2)
    wide = taps_ptr.dtype.element_ty
    even_even = tl.zeros((R, C), wide)
    even_odd, odd_even, odd_odd = even_even, even_even, even_even
    for t in range((ROW_TAPS + 1) // 2):
        row = r - t
        for band_r in tl.static_range(ROWS):
            even = tl.zeros((R, C), wide)
            odd = even
            for u in range((COLUMN_TAPS + 1) // 2):
                column = c - u
                inside = ((row >= 0) & (row < y_rows))[:, None] & ((column >= 0) & (column < y_columns))[None]
                place = row.to(tl.int64)[:, None] * y_row + column.to(tl.int64)[None] * y_column + band_r * y_band_r
                for band_c in tl.static_range(COLUMNS):
                    y = tl.load(y_ptr + place + band_c * y_band_c, mask=inside, other=0.0).to(wide)
                    if COLUMNS == 2:
                        tap = taps_ptr + (band_c + 1) * COLUMN_TAPS - 1 - 2 * u
                        even += tl.load(tap) * y
                        odd += tl.load(tap - 1) * y
                    else:
                        even += y
            if ROWS == 2:
                tap = taps_ptr + (band_r + 1) * ROW_TAPS - 1 - 2 * t
                first, second = tl.load(tap), tl.load(tap - 1)
                even_even += first * even
                odd_even += second * even
                even_odd += first * odd
                odd_odd += second * odd
            else:
                even_even += even
                even_odd += odd
    row = ROWS * r - first_row
    column = COLUMNS * c - first_column
    _put(x_ptr, even_even, row, column, x_rows, x_columns, x_row, x_column)
    if COLUMNS == 2:
        _put(x_ptr, even_odd, row, column + 1, x_rows, x_columns, x_row, x_column)
    if ROWS == 2:
        _put(x_ptr, odd_even, row + 1, column, x_rows, x_columns, x_row, x_column)
        if COLUMNS == 2:
            _put(x_ptr, odd_odd, row + 1, column + 1, x_rows, x_columns, x_row, x_column)


@triton.jit
def _put(x_ptr, x, row, column, rows, columns, x_row, x_column):
    inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None]
    place = row.to(tl.int64)[:, None] * x_row + column.to(tl.int64)[None] * x_column
    tl.store(x_ptr + place, narrow(x, x_ptr.dtype.element_ty), mask=inside)


def _grid(rows: int, columns: int, planes: int, x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Programs, and the shape of their tiles."""
    tile = tuned(TILES, x)
    across = min(triton.next_power_of_2(columns), 64)
    down = min(triton.next_power_of_2(rows), tile.results // across)
    return (planes * triton.cdiv(rows, down) * triton.cdiv(columns, across),), {
        "R": down,
        "C": across,
        "num_warps": tile.warps,
    }


def _take_apart(x: Tensor, y: Tensor, taps: Tensor, row: Tensor | None, column: Tensor | None) -> None:
    """One pass over x (n0, n1, n2, rows, columns) into y (n0, n1, n2, bands of columns, of rows, *k).

    `row` and `column` are tables of samples, None for an axis that is left.
    """
    if y.numel():
        n0, n1, n2, _, _, rows, columns = y.shape
        grid, settings = _grid(rows, columns, n0 * n1 * n2, x)
        lengths = [1 if table is None else taps.shape[1] for table in (row, column)]
        _analysis_kernel[grid](
            x, y, taps, row, column, n1, n2, rows, columns, *x.stride(), *y.stride(), *lengths, **settings
        )


def _put_together(x: Tensor, y: Tensor, taps: Tensor, row: int | None, column: int | None) -> None:
    """One pass back from y into x; `row` and `column` are the first samples of `x`, None of an axis that is left."""
    if x.numel():
        n0, n1, n2, rows, columns = x.shape
        pairs = [
            n if first is None else (first + n - 1) // 2 + 1 - first // 2
            for n, first in ((rows, row), (columns, column))
        ]
        grid, settings = _grid(*pairs, n0 * n1 * n2, x)
        lengths = [1 if first is None else taps.shape[1] for first in (row, column)]
        _synthesis_kernel[grid](
            y, x, taps, n1, n2, row or 0, column or 0, rows, columns, *y.shape[5:], *y.stride(), *x.stride(),
            *lengths, **settings,
        )  # fmt: skip


def _last_axes(x: Tensor, y: Tensor, together: bool) -> tuple[Tensor, Tensor]:
    """Signals (b, c, *sizes), and their bands of the last axis or the last two, as the kernels take them."""
    if x.ndim == 3:
        return x[:, None, None], y.transpose(1, 2)[:, None, None, :, None]  # b 1 1 c n, b 1 1 2 1 c k
    x = x if x.ndim == 5 else x[:, :, None]  # b c before rows columns
    y = y.reshape(*x.shape[:2], 2, 1 + together, x.shape[2], *y.shape[-2:])
    return x, y.permute(0, 1, 4, 2, 3, 5, 6)


def _one_axis(x: Tensor, y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Bands (b, c, bands, *sizes), and with those of one more axis, as the kernels take them."""
    b, c, bands, *sizes = x.shape
    ahead, behind = prod(sizes[:axis]), prod(sizes[axis + 1 :])
    y = y.reshape(b * c, bands, 2, ahead, y.shape[3 + axis], behind)
    return x.reshape(b * c, bands, ahead, sizes[axis], behind), y.permute(0, 1, 3, 2, 4, 5)[:, :, :, None]


@torch.library.custom_op("zoo::dwt_triton_analysis", mutates_args=())
def _analysis(x: Tensor, taps: Tensor, mode: str) -> Tensor:
    """Bands (b, c, bands, *k) of signals (b, c, *sizes), in the precision of `taps`; dtype of `x`."""
    out = _bands_like(x, taps, mode)
    if mode in WEIGHTED:
        x = _extended(x, out.shape[3:], taps, mode)
        tables = [torch.arange(n, dtype=torch.int32, device=x.device) for n in x.shape[2:]]
    else:
        tables = [sources(n, taps.shape[1], mode, x.device) for n in x.shape[2:]]
    axis = _first_axis(x.ndim - 2, taps)
    y = _between(x, out, axis, taps)
    together = axis < x.ndim - 3
    _take_apart(*_last_axes(x, y, together), taps, tables[-2] if together else None, tables[-1])
    while axis:
        axis -= 1
        given, y = y, _between(x, out, axis, taps)
        _take_apart(*_one_axis(given, y, axis), taps, tables[axis], None)
    return y


@torch.library.custom_op("zoo::dwt_triton_synthesis", mutates_args=())
def _synthesis(bands: Tensor, taps: Tensor, mode: str, sizes: Sequence[int]) -> Tensor:
    """The adjoint of `_analysis`: (b, c, bands, *k) -> (b, c, *sizes)."""
    out = bands.new_empty(*bands.shape[:2], *sizes)
    start, whole = before(taps.shape[1], mode), [2 * k + taps.shape[1] - 2 for k in bands.shape[3:]]
    folded = mode != "zero" and whole != list(sizes)
    x, first = (taps.new_empty(*bands.shape[:2], *whole), 0) if folded else (out, start)
    y, last = bands, _first_axis(x.ndim - 2, taps)
    for axis in range(last):
        given, y = y, _between(x, bands, axis + 1, taps)
        _put_together(*_one_axis(y, given, axis), taps, first, None)
    together = last < x.ndim - 3
    _put_together(*_last_axes(x, y, together), taps, first if together else None, first)
    if folded:
        fold_into(out.flatten(0, 1), x.flatten(0, 1), start, mode)
    return out


def _first_axis(ndim: int, taps: Tensor) -> int:
    """The first of the axes that are done in one pass, the last or the last two; the others are done one by one."""
    return ndim - 2 if ndim > 1 and taps.shape[1] <= _TOGETHER else ndim - 1


def _between(x: Tensor, bands: Tensor, axis: int, taps: Tensor) -> Tensor:
    """Room for samples along the axes before `axis` and bands from there on: all of them are the result."""
    ndim = x.ndim - 2
    shape = 2 ** (ndim - axis), *x.shape[2 : 2 + axis], *bands.shape[3 + axis :]
    return bands.new_empty(*bands.shape[:2], *shape, dtype=taps.dtype if axis else bands.dtype)


def _extended(x: Tensor, ks: Sequence[int], taps: Tensor, mode: str) -> Tensor:
    """A copy with all the samples that the coefficients read."""
    start, length = before(taps.shape[1], mode), taps.shape[1]
    y = taps.new_empty(*x.shape[:2], *(2 * k + length - 2 for k in ks))
    flat = y.flatten(0, 1)
    y[(slice(None), *inner(start, x.shape[2:]))] = x
    for axis, n in enumerate(x.shape[2:], 1):
        fill(flat, axis, start, n, mode)
    return y


@_analysis.register_fake
def _bands_like(x: Tensor, taps: Tensor, mode: str) -> Tensor:
    sizes = [band_size(n, taps.shape[1], mode) for n in x.shape[2:]]
    return x.new_empty(*x.shape[:2], 2 ** len(sizes), *sizes)


@_synthesis.register_fake
def _(bands: Tensor, taps: Tensor, mode: str, sizes: Sequence[int]) -> Tensor:
    return bands.new_empty(*bands.shape[:2], *sizes)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.mode, ctx.sizes = inputs[2], inputs[0].shape[2:]


_analysis.register_autograd(
    lambda ctx, grad: (_synthesis(grad, *ctx.saved_tensors, ctx.mode, ctx.sizes), None, None), setup_context=_keep
)
_synthesis.register_autograd(
    lambda ctx, grad: (_analysis(grad, *ctx.saved_tensors, ctx.mode), None, None, None), setup_context=_keep
)
