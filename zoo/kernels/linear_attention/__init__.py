"""Attention without a softmax: keys and values become one d x e matrix that all queries read, in linear time.

    S = sum_j f(k_j) v_j^T      z = sum_j f(k_j)      over m keys; n queries; f is the feature map

    norm="mean"          o_i = f(q_i) S/m / (f(q_i) . z/m + eps)
    norm="mean_queries"  o_i = f(q_i) S/n / (f(q_i) . z/m + eps)
    norm="sum"           o_i = f(q_i) S / (f(q_i) . z + eps)
    norm=None            o_i = f(q_i) S

    "elu1"        f(x) = elu(x) + 1 + map_eps
    "relu"        f(x) = relu(x) + map_eps
    "identity"    f(x) = x + map_eps
    "softmax_qk"  f = softmax over the features of a query, over the tokens of a key; needs norm=None

LinFusion is elu1, norm="mean" and eps=1e-4; its cross-attention divides by the number of queries, "mean_queries". LiT
is relu, map_eps=1e-6, norm="mean" and eps=1e-6. Both split 1/m into m^-0.5 on keys and on values for the sake of
float16; here sums are float32 or wider, and S is divided where it is whole. ScatterFormer is relu, norm="sum",
eps=1e-6 and `cu_seqlens`. Efficient attention is "softmax_qk".

S, z and m of token shards add up, so that tokens on several machines cost one all-reduce of d x e numbers a head:

    none = slice(0, 0)
    _, state = linear_attention(q[:, :, none], k, v, return_state=True)           # of the own tokens
    state = LinearState(*(all_reduce(t) for t in state))
    out = linear_attention(q, k[:, :, none], v[:, :, none], state=state)          # the own queries on all keys

Source: Katharopoulos et al. 2020; LinFusion (Liu et al. 2024), `GeneralizedLinearAttention`; LiT (Wang et al. 2025);
decoupled numerator as in MLLA (Han et al. 2024); Shen et al. 2021 for softmax_qk.
"""

import torch
from torch import Tensor

from zoo.kernels.impls import pick

from .state import LinearState

__all__ = ["LinearState", "linear_attention"]

MAPS = ("elu1", "relu", "identity", "softmax_qk")
NORMS = ("mean", "mean_queries", "sum", None)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "elu1",
    map_eps: float = 0.0,
    norm: str | None = "mean",
    eps: float = 1e-6,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    state: LinearState | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, LinearState]:
    """Read the summed keys and values with each query. Differentiable in all float tensors, the state too.

    Without any key the output is 0. Sums are float32 or wider, whatever the dtype of the tokens.

    Args:
        q: queries, (b, heads, n, d), any strides.
        k: keys, (b, heads, m, d), dtype of `q`.
        v: values, (b, heads, m, e), dtype of `q`.
        feature_map: "elu1", "relu", "identity" or "softmax_qk", applied inside.
        map_eps: added to each feature, at least 0.
        norm: "mean", "mean_queries" (the queries of this call: a shard of them is divided by its own number), "sum" or
            None, see above.
        eps: added to the denominator, at least 0; features that are all zero need it.
        q2: features that the numerator takes in place of f(q), as they are; shape and dtype of `q`.
        k2: the same for f(k): S = sum_j k2_j v_j^T; together with `q2`.
        cu_seqlens: borders of segments of tokens that see only each other, int32 or int64 (segments + 1,), rising from
            0 to n = m; the same for each sample.
        state: keys and values that came before and count as well.
        return_state: whether to return the sums over all keys, those of `state` included.
        impl: "reference", "torch", "triton" (not in float64), or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, heads, n, e), dtype of `q`; with `return_state` a tuple with the `LinearState`.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or an unknown `impl`.
    """
    _check_tokens(q, k, v, q2, k2)
    _check_options(feature_map, map_eps, norm, eps, q2, state is not None or return_state)
    segments = _check_segments(cu_seqlens, q, k)
    if state is not None:
        _check_state(state, (*q.shape[:2], *segments, q.shape[3], v.shape[3]))

    keys, queries, wide = float(k.shape[2]), float(q.shape[2]), torch.promote_types(q.dtype, torch.float32)
    if cu_seqlens is not None:
        keys = queries = cu_seqlens.diff().to(wide)
    if state is not None:
        keys = keys + state.keys.to(wide)
    each = {"mean": (keys, keys), "mean_queries": (queries, keys), "sum": (1.0, 1.0), None: (1.0, None)}[norm]
    divisors = _at_least_one(each[0]), None if each[1] is None else _at_least_one(each[1])

    impl = pick("linear_attention", impl, q, triton=q.dtype != torch.float64)
    if impl == "reference":
        from .reference import forward
    elif impl == "torch":
        from .torch_impl import forward
    else:
        from .triton_impl import forward
    before = None if state is None else (state.kv.to(wide), state.k.to(wide))
    out, kv, z = forward(q, k, v, q2, k2, feature_map, map_eps, divisors, eps, cu_seqlens, before)
    if not return_state:
        return out
    return out, LinearState(kv, z, keys if isinstance(keys, Tensor) else z.new_full((), keys))


def _at_least_one(count: Tensor | float) -> Tensor | float:
    """Sums over no tokens are 0, and divided by one they stay so."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)


def _check_tokens(q: Tensor, k: Tensor, v: Tensor, q2: Tensor | None, k2: Tensor | None) -> None:
    if q.ndim != 4 or not q.shape[3]:
        raise ValueError(f"linear_attention: q must be (b, heads, n, d) with d at least 1, got {tuple(q.shape)}")
    b, heads, _, d = q.shape
    if k.ndim != 4 or (*k.shape[:2], k.shape[3]) != (b, heads, d):
        raise ValueError(f"linear_attention: k must be {(b, heads, 'm', d)}, got {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3]:
        raise ValueError(f"linear_attention: v must be {(*k.shape[:3], 'e')}, got {tuple(v.shape)}")
    if (q2 is None) != (k2 is None):
        raise ValueError("linear_attention: q2 and k2 must come together, got one of them")
    for name, own, other in (("q2", q2, q), ("k2", k2, k)):
        if own is not None and own.shape != other.shape:
            raise ValueError(f"linear_attention: {name} must be {tuple(other.shape)}, got {tuple(own.shape)}")
    dtypes = [t.dtype for t in (q, k, v, q2, k2) if t is not None]
    if not q.is_floating_point() or set(dtypes) != {q.dtype}:
        raise ValueError(f"linear_attention: q, k, v, q2 and k2 must be of one float dtype, got {dtypes}")


def _check_options(
    feature_map: str, map_eps: float, norm: str | None, eps: float, q2: Tensor | None, with_state: bool
) -> None:
    if feature_map not in MAPS:
        raise ValueError(f"linear_attention: feature_map must be one of {', '.join(MAPS)}, got {feature_map!r}")
    if norm not in NORMS:
        raise ValueError(f"linear_attention: norm must be mean, mean_queries, sum or None, got {norm!r}")
    if map_eps < 0 or eps < 0:
        raise ValueError(f"linear_attention: map_eps and eps must be at least 0, got {map_eps}, {eps}")
    if norm is None and q2 is not None:
        raise ValueError("linear_attention: norm must not be None where q2 and k2 part it from the numerator, got None")
    if feature_map == "softmax_qk" and (norm is not None or map_eps or with_state):
        raise ValueError(
            "linear_attention: softmax_qk must have norm=None, map_eps=0 and no state (its keys are divided by a sum "
            f"over all tokens), got {norm=}, {map_eps=}, {with_state=}"
        )


def _check_segments(cu_seqlens: Tensor | None, q: Tensor, k: Tensor) -> tuple[int, ...]:
    if cu_seqlens is None:
        return ()
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "linear_attention: cu_seqlens must be int32 or int64 (segments + 1,) with at least one segment, "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if q.shape[2] != k.shape[2] or cu_seqlens.device != q.device:
        raise ValueError(
            "linear_attention: q and k must have the same tokens, on the device of cu_seqlens, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {q.device}, {cu_seqlens.device}"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere a look would cost a wait
        borders = cu_seqlens.tolist()
        if [0, *sorted(borders), q.shape[2]] != [borders[0], *borders, borders[-1]]:
            raise ValueError(f"linear_attention: cu_seqlens must rise from 0 to {q.shape[2]}, got {borders}")
    return (len(cu_seqlens) - 1,)


def _check_state(state: LinearState, shape: tuple[int, ...]) -> None:
    if state.kv.shape != shape or state.k.shape != shape[:-1]:
        raise ValueError(
            f"linear_attention: state must have kv {shape} and k {shape[:-1]}, "
            f"got {tuple(state.kv.shape)}, {tuple(state.k.shape)}"
        )
