"""Softmax attention inside the rectangular windows of a token map.

For query i in window W, over the keys j that W sees:

    o_i = sum_j p_ij v_j        p_i = softmax_j(scale q_i . k_j + bias_table[bias_index[i, j] mod rows])

1. The map (h, w) is padded with zero tokens at the bottom and at the right to a multiple of the window. With `order`,
   place n of the map (raster) holds token order[n].
2. It is rolled by minus `shift` and cut into windows; the result is rolled back. Where a window then holds tokens from
   opposite borders, a query sees only the keys that came with it (`wrap=False`), or all of them (`wrap=True`, CRAFT).
3. With `dilation`, the tokens of a window lie that far apart: each cell of window x dilation tokens holds as many
   interleaved windows as tokens lie between.
4. With `overlap`, the keys of a window reach that many tokens further on each side (HAT: 16 x 16 queries on 24 x 24
   keys); beyond the map there is padding.
5. Padding is never seen (`pad="mask"`), or it is a key like any other (`pad="attend"`): a zero token, so that its logit
   is the bias alone and its value nothing. The published weights of HAT count on the latter where keys overlap.

What papers call otherwise, on a map of (h, w):

    stripes (CSWin)                         window=(h, 7) for one half of the heads, window=(7, w) for the other
    grid (MaxViT), h and w in sevens        window=7, dilation=(h // 7, w // 7)
    bins of a histogram, by `order`         grid=(1, n), window=(1, n // bins)
    combs through a histogram, by `order`   grid=(1, n), window=(1, n // combs), dilation=(1, combs)
    softmax plus one, exp / (1 + sum exp)   grid=(1, n), window=(1, n + 1), pad="attend", no bias

Safe in float16 and bfloat16: logits, softmax and sums are float32 or wider whatever the dtype of the tokens, and an
output is a mean of values. What makes SwinIR fail in float16 lies outside: the residual stream of its weights grows
from group to group until it leaves the range of 65,504 (JingyunLiang/SwinIR, issues 103 and 180). HAT is built alike,
so bfloat16 is the low precision for both.

Source: Swin Transformer (Liu et al. 2021), section 3.2; HAT (Chen et al. 2023), overlapping cross-attention; CRAFT (Li
et al. 2023) for rectangles that wrap; CSWin (Dong et al. 2022); MaxViT (Tu et al. 2022); Histoformer (Sun et al. 2024).
"""

import torch
from torch import Tensor

from zoo.kernels.impls import pick

from .positions import overlapping_position_index, relative_position_index

__all__ = ["overlapping_position_index", "relative_position_index", "window_attention"]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    window: int | tuple[int, int],
    dilation: int | tuple[int, int] = (1, 1),
    shift: int | tuple[int, int] = (0, 0),
    overlap: int | tuple[int, int] = (0, 0),
    wrap: bool = False,
    order: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    pad: str = "mask",
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attend inside windows of the token map. Differentiable in q, k, v and the bias table.

    Args:
        q: queries, (b, heads, n, d), d at least 1, any strides.
        k: keys, (b, heads, n, d), dtype of `q`.
        v: values, (b, heads, n, e), dtype of `q`.
        grid: rows and columns of the map (h, w); n = h w in raster order.
        window: rows and columns of a window (wh, ww) in tokens, or one number for both.
        dilation: distance in tokens between neighbours of a window; not together with `shift`, `wrap` or `overlap`.
        shift: tokens by which the windows are displaced down and right, each in [0, window).
        overlap: tokens by which a key window reaches beyond its query window on each side; not together with `shift`.
        wrap: whether tokens that the shift brought from the opposite border are seen too.
        order: token that each place of the map holds, int64 (b or 1, heads or 1, n), every token once (not checked).
        bias_table: additive bias by relative position, (rows, heads); any float dtype.
        bias_index: row of the table for each pair, int64 (wh ww, (wh + 2 oh) (ww + 2 ow)), read modulo rows.
        pad: "mask" keeps padding out of the softmax, "attend" lets it in as zero keys with zero values.
        scale: factor of the products; d^-0.5 when None.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA, torch elsewhere). Triton takes float32,
            float16 and bfloat16 with d and e up to 256.

    Returns:
        (b, heads, n, e), dtype of `q`; in the order of `q` also where `order` is given.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or an unknown `impl`.
    """
    grid, window, dilation, shift, overlap = (
        _pair(name, value)
        for name, value in (
            ("grid", grid),
            ("window", window),
            ("dilation", dilation),
            ("shift", shift),
            ("overlap", overlap),
        )
    )
    _check_tokens(q, k, v, grid, order)
    _check_geometry(window, dilation, shift, overlap, wrap, pad)
    _check_bias(bias_table, bias_index, q.shape[1], window, overlap)
    triton = q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= 256
    impl = pick("window_attention", impl, q, triton=triton)
    if impl == "reference":
        from .reference import forward
    elif impl == "torch":
        from .torch_impl import forward
    else:
        from .triton_impl import forward
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    return forward(q, k, v, grid, window, dilation, shift, overlap, wrap, order, bias_table, bias_index, pad, factor)


def _pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"window_attention: {name} must be one number or (rows, columns), got {value}")
    return pair


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], order: Tensor | None) -> None:
    if q.ndim != 4 or not q.shape[3]:
        raise ValueError(f"window_attention: q must be (b, heads, n, d) with d at least 1, got {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(
            f"window_attention: k must be (b, heads, n, d) like q, got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"window_attention: v must be {(*q.shape[:3], 'e')}, got {tuple(v.shape)}")
    if min(grid) < 0 or grid[0] * grid[1] != q.shape[2]:
        raise ValueError(f"window_attention: grid must be (h, w) with h w = {q.shape[2]} tokens, got {grid}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"window_attention: k and v must be float like q, got {q.dtype}, {k.dtype}, {v.dtype}")
    if order is not None:
        b, heads, n = q.shape[:3]
        fits = order.ndim == 3 and order.shape[0] in (1, b) and order.shape[1] in (1, heads) and order.shape[2] == n
        if not fits or order.dtype != torch.int64:
            raise ValueError(
                f"window_attention: order must be int64 ({b} or 1, {heads} or 1, {n}), "
                f"got {order.dtype} {tuple(order.shape)}"
            )


def _check_geometry(
    window: tuple[int, int],
    dilation: tuple[int, int],
    shift: tuple[int, int],
    overlap: tuple[int, int],
    wrap: bool,
    pad: str,
) -> None:
    if min(window) < 1:
        raise ValueError(f"window_attention: window must be at least (1, 1), got {window}")
    if min(dilation) < 1:
        raise ValueError(f"window_attention: dilation must be at least (1, 1), got {dilation}")
    if any(not 0 <= s < size for s, size in zip(shift, window, strict=True)):
        raise ValueError(f"window_attention: shift must be in [0, window) for window {window}, got {shift}")
    if min(overlap) < 0:
        raise ValueError(f"window_attention: overlap must be at least (0, 0), got {overlap}")
    if any(overlap) and (any(shift) or wrap):
        raise ValueError(
            f"window_attention: overlap must be (0, 0) for windows that shift or wrap, got {overlap}, {shift=}, {wrap=}"
        )
    if max(dilation) > 1 and (any(shift) or any(overlap) or wrap):
        raise ValueError(
            f"window_attention: dilation must be (1, 1) for windows that shift, overlap or wrap, got {dilation}, "
            f"{shift=}, {overlap=}, {wrap=}"
        )
    if pad not in ("mask", "attend"):
        raise ValueError(f"window_attention: pad must be mask or attend, got {pad!r}")


def _check_bias(
    table: Tensor | None, index: Tensor | None, heads: int, window: tuple[int, int], overlap: tuple[int, int]
) -> None:
    if table is None and index is None:
        return
    if table is None or index is None:
        raise ValueError("window_attention: bias_table and bias_index must come together, got one of them")
    if table.ndim != 2 or table.shape[1] != heads or not len(table) or not table.is_floating_point():
        raise ValueError(f"window_attention: bias_table must be float (rows, {heads}), got {tuple(table.shape)}")
    queries = window[0] * window[1]
    keys = (window[0] + 2 * overlap[0]) * (window[1] + 2 * overlap[1])
    if index.shape != (queries, keys) or index.dtype != torch.int64:
        raise ValueError(
            f"window_attention: bias_index must be int64 {(queries, keys)}, got {index.dtype} {tuple(index.shape)}"
        )
