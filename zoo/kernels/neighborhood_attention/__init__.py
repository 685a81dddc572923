"""Softmax attention of each token of a 1-, 2- or 3-D grid to the tokens around it.

    o_i = sum_j p_ij v_j    p_i = softmax_j(scale q_i . k_j + bias[heads, j - i])    lse_i = log sum_j exp(...)

j runs over the window of i and over the extra keys, which every query sees and which have no bias. Along an axis of L
tokens with kernel k, dilation 1 and stride s:

    leader     l = min(i // s * s + s // 2, L - 1)
    clamp      keys from start = clamp(l - k // 2, 0, L - k) to start + k - 1: always k of them       (NATTEN)
    truncate   keys from l - k // 2 to l - k // 2 + k - 1, those beyond the border left out           (CLEAR, SASA)
    causal     l = min(i // s * s + s - 1, L - 1), keys from max(l - k + 1, 0) to i

- `radius` r stands for kernel 2 r + 1, on a causal axis r + 1. A kernel longer than the axis sees all of it.
- Dilation g: the rule holds on each class of coordinates that agree modulo g, counted in steps of g.
- A circle of radius r (a ball in 3-D) keeps the keys at a distance of less than r, strictly, from the leader, on a
  causal axis from the query; r = 1 is the token alone. It is always truncated.
- `stride` = kernel gives plain blocks; an even kernel reaches one token further back than ahead.
- `pool` weighs and sums the tokens of each cell of the grid to one more extra key and value (CLEAR, down-sampling).

Softmax and sums in float32 or wider. Nothing of n x n elements is made on any device, except by the reference.

Source: NATTEN (Hassani et al. 2023, 2025), attention of the 0.21 releases; CLEAR (Liu et al. 2024), its mask functions.
"""

import torch
from torch import Tensor

from zoo.kernels.impls import pick

from .plan import Axis, Geometry
from .pooling import pool_cells

__all__ = ["neighborhood_attention"]


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: int | tuple[int, ...],
    kernel: int | tuple[int, ...] | None = None,
    radius: int | tuple[int, ...] | None = None,
    dilation: int | tuple[int, ...] = 1,
    stride: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    shape: str = "box",
    edge: str = "clamp",
    extra_kv: tuple[Tensor, Tensor] | None = None,
    pool: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to the neighbourhood of each token. Differentiable in every tensor, through both results.

    Args:
        q: queries, (b, heads, n, d), d at least 1, any strides.
        k: keys, (b, heads, n, d), dtype of `q`.
        v: values, (b, heads, n, e), dtype of `q`.
        grid: tokens along each axis, (n,), (h, w) or (t, h, w) in raster order.
        kernel: keys along each axis, or one number for all; this or `radius`.
        radius: reach along each axis, at least 0; for a circle one number, at least 1.
        dilation: distance of neighbouring keys of a window, at least 1.
        stride: queries that share a window, in [1, kernel].
        causal: axes along which no later key is seen.
        shape: "box" or "circle".
        edge: "clamp" moves windows inside the grid, "truncate" cuts them off at its border.
        extra_kv: keys (b, heads, m, d) and values (b, heads, m, e) that every query sees.
        pool: weights of the tokens of a cell, one axis for each of the grid, (4, 4) for cells of 4 x 4 tokens. Tokens
            beyond the last whole cell are left out.
        bias: by position of the key minus that of the query in steps of the dilation, (heads, 2 reach + 1, ...) with 0
            in the middle; any float dtype. The reach is kernel - 1 where the edge clamps and on causal axes, otherwise
            kernel // 2 + stride // 2; a circle of radius r counts as kernel 2 r - 1, on a causal axis r.
        scale: factor of the products; d^-0.5 when None.
        return_lse: also the natural logarithm of the sum of exponentials.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA where it can, torch elsewhere).

    Returns:
        (b, heads, n, e), dtype of `q`; with `return_lse` also (b, heads, n), float32 or wider.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or an unknown `impl`.
    """
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    _check_tokens(q, k, v, grid)
    _check_extra(q, v, extra_kv, pool, grid)
    geometry = _geometry(grid, kernel, radius, dilation, stride, causal, shape, edge)
    _check_bias(bias, q.shape[1], geometry)
    extra_k, extra_v = extra_kv or (None, None)
    if pool is not None:
        extra_k, extra_v = (
            pooled if extra is None else torch.cat([extra, pooled], 2)
            for extra, pooled in ((extra_k, pool_cells(k, grid, pool)), (extra_v, pool_cells(v, grid, pool)))
        )
    # Tensor cores have no float64, and wider heads do not fit into shared memory.
    triton = q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= 256
    impl = pick("neighborhood_attention", impl, q, triton=triton)
    if impl == "reference":
        from .reference import forward
    elif impl == "torch":
        from .torch_impl import forward
    else:
        from .triton_impl import forward
    out, lse = forward(q, k, v, extra_k, extra_v, bias, geometry, q.shape[-1] ** -0.5 if scale is None else scale)
    return (out, lse) if return_lse else out


def _geometry(
    grid: tuple[int, ...],
    kernel: int | tuple[int, ...] | None,
    radius: int | tuple[int, ...] | None,
    dilation: int | tuple[int, ...],
    stride: int | tuple[int, ...],
    causal: bool | tuple[bool, ...],
    shape: str,
    edge: str,
) -> Geometry:
    if shape not in ("box", "circle"):
        raise ValueError(f"neighborhood_attention: shape must be box or circle, got {shape!r}")
    if edge not in ("clamp", "truncate"):
        raise ValueError(f"neighborhood_attention: edge must be clamp or truncate, got {edge!r}")
    if (kernel is None) == (radius is None):
        raise ValueError(f"neighborhood_attention: one of kernel and radius must be given, got {kernel=}, {radius=}")
    circle = radius if shape == "circle" and isinstance(radius, int) else 0
    if shape == "circle" and not (edge == "truncate" and circle > 0):
        raise ValueError(
            "neighborhood_attention: a circle must have edge='truncate' and one radius of at least 1, "
            f"got {edge=}, {radius=}"
        )
    ndim = len(grid)
    causal = tuple(map(bool, _per_axis("causal", causal, ndim, 0)))
    dilation, stride = _per_axis("dilation", dilation, ndim, 1), _per_axis("stride", stride, ndim, 1)
    if radius is not None:
        more = shape == "box"
        kernel = tuple(
            r + more if one_way else 2 * r - 1 + 2 * more
            for r, one_way in zip(_per_axis("radius", radius, ndim, 0), causal, strict=True)
        )
    kernel = _per_axis("kernel", kernel, ndim, 1)
    if any(s > size for s, size in zip(stride, kernel, strict=True)):
        raise ValueError(f"neighborhood_attention: stride must be at most the kernel {kernel}, got {stride}")
    axes = zip(grid, kernel, dilation, stride, causal, [edge == "clamp"] * ndim, strict=True)
    return Geometry(tuple(Axis(*axis) for axis in axes), circle)


def _per_axis(name: str, value: int | tuple[int, ...] | None, ndim: int, least: int) -> tuple[int, ...]:
    given = (value,) * ndim if isinstance(value, int) else tuple(value or ())
    if len(given) != ndim or min(given) < least:
        raise ValueError(
            f"neighborhood_attention: {name} must be one number or {ndim} of them, at least {least}, got {value}"
        )
    return given


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, ...]) -> None:
    if q.ndim != 4 or not q.shape[3]:
        raise ValueError(f"neighborhood_attention: q must be (b, heads, n, d) with d at least 1, got {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(
            f"neighborhood_attention: k must be (b, heads, n, d) like q, got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"neighborhood_attention: v must be {(*q.shape[:3], 'e')}, got {tuple(v.shape)}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"neighborhood_attention: k and v must be float like q, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not 1 <= len(grid) <= 3 or min(grid) < 0 or torch.Size(grid).numel() != q.shape[2]:
        raise ValueError(
            f"neighborhood_attention: grid must be 1 to 3 lengths with a product of {q.shape[2]} tokens, got {grid}"
        )


def _check_extra(
    q: Tensor, v: Tensor, extra_kv: tuple[Tensor, Tensor] | None, pool: Tensor | None, grid: tuple[int, ...]
) -> None:
    if extra_kv is not None:
        keys, values = extra_kv
        b, heads, _, d = q.shape
        expected = (b, heads, "m", d), (b, heads, "m", v.shape[3])
        if (
            keys.ndim != 4
            or keys.shape[:2] != q.shape[:2]
            or keys.shape[3] != d
            or values.shape
            != (
                *keys.shape[:3],
                v.shape[3],
            )
        ):
            raise ValueError(
                f"neighborhood_attention: extra_kv must be {expected[0]} and {expected[1]}, "
                f"got {tuple(keys.shape)}, {tuple(values.shape)}"
            )
        if keys.dtype != q.dtype or values.dtype != q.dtype:
            raise ValueError(
                f"neighborhood_attention: extra_kv must be {q.dtype} like q, got {keys.dtype}, {values.dtype}"
            )
    if pool is not None and (pool.ndim != len(grid) or not pool.numel() or not pool.is_floating_point()):
        raise ValueError(
            f"neighborhood_attention: pool must be float with {len(grid)} axes as the grid {grid}, "
            f"got {tuple(pool.shape)}"
        )


def _check_bias(bias: Tensor | None, heads: int, geometry: Geometry) -> None:
    expected = (heads, *(2 * axis.reach + 1 for axis in geometry.axes))
    if bias is not None and (bias.shape != expected or not bias.is_floating_point()):
        raise ValueError(f"neighborhood_attention: bias must be float {expected}, got {tuple(bias.shape)}")
