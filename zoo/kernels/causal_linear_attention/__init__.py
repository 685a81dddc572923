"""Linear attention that looks back: a state is carried from block to block of tokens, and may decay on the way.

    S_B = exp(sum of g_t over t in B) S_(B-1) + sum_(t in B) k_t v_t^T      o_t = q_t S_B for every t in block B
    norm="z"  o_t = q_t S_B / (q_t . z_B + eps),  z like S with 1 in the place of v_t

With `block=1` that is S_t = diag(exp(g_t)) S_(t-1) + k_t v_t^T. Larger blocks see all of themselves, undecayed, and
what came before them: frames of a video, tokens of one image. The logarithms g of the decay are per head (retention,
Lightning attention), per token (Mamba-2), or per token and channel of the keys (gated linear attention).

Every implementation multiplies by exp of sums of g over a stretch of tokens, which is at most 1, and never divides by
such a product, so that no decay is too strong; g = -inf starts afresh. Float32 or wider inside.

Source: Katharopoulos et al. 2020; TransNormerLLM (Qin et al. 2023); GLA (Yang et al. 2024) for decay by channel.
"""

import torch
from torch import Tensor

from zoo.kernels.impls import pick


def causal_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    block: int = 1,
    norm: str | None = None,
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Read the running state with each query. Differentiable in all tensors.

    Args:
        q: queries, (b, heads, n, d), after the feature map and whatever scale; any strides.
        k: keys, (b, heads, n, d), dtype of `q`.
        v: values, (b, heads, n, e), dtype of `q`.
        log_decay: g, at most 0: (heads,), (b, heads, n), or (b, heads, n, d); any float dtype; None for no decay.
        block: tokens of a block, at least 1; the last one may be shorter. A call starts a new block.
        norm: "z" divides by the sum of the same weights, None does not.
        eps: added to that sum, at least 0.
        initial_state: what came before, (b, heads, d, e); with norm="z" (b, heads, d, e + 1), the last column being z.
        return_state: whether to return the state after the last token, float32 or wider, shaped as `initial_state`.
        impl: "reference", "torch", "triton" (not in float64), or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, heads, n, e), dtype of `q`; with `return_state` a tuple with the state.

    Raises:
        ValueError: shapes, dtypes or options that do not fit together, or an unknown `impl`.
    """
    _check(q, k, v, log_decay, block, norm, eps, initial_state)
    impl = pick("causal_linear_attention", impl, q, triton=q.dtype != torch.float64)
    if impl == "reference":
        from .reference import forward
    elif impl == "torch":
        from .torch_impl import forward
    else:
        from .triton_impl import forward
    if log_decay is not None:
        if log_decay.ndim == 1:
            log_decay = log_decay[None, :, None].expand(q.shape[:3])
        if log_decay.ndim == 3:
            log_decay = log_decay[..., None]  # b heads n 1
    if norm == "z":
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)  # z is the state of one more value that is always 1
    wide = torch.promote_types(q.dtype, torch.float32)
    if initial_state is None:
        initial_state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=wide)
    out, state = forward(q, k, v, log_decay, block, initial_state, wide if norm == "z" else q.dtype)
    if norm == "z":
        out = (out[..., :-1] / (out[..., -1:] + eps)).to(q.dtype)
    return (out, state) if return_state else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    block: int,
    norm: str | None,
    eps: float,
    initial_state: Tensor | None,
) -> None:
    op = "causal_linear_attention"
    if q.ndim != 4 or not q.shape[3]:
        raise ValueError(f"{op}: q must be (b, heads, n, d) with d at least 1, got {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"{op}: k must be (b, heads, n, d) like q, got q {tuple(q.shape)}, k {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or not v.shape[3]:
        raise ValueError(f"{op}: v must be {(*q.shape[:3], 'e')}, got {tuple(v.shape)}")
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{op}: k and v must be float like q, got {q.dtype}, {k.dtype}, {v.dtype}")
    shapes = [tuple(q.shape[1:2]), tuple(q.shape[:3]), tuple(q.shape)]
    if log_decay is not None and (tuple(log_decay.shape) not in shapes or not log_decay.is_floating_point()):
        raise ValueError(
            f"{op}: log_decay must be float, one of {shapes}, got {log_decay.dtype} {tuple(log_decay.shape)}"
        )
    if block < 1:
        raise ValueError(f"{op}: block must be at least 1, got {block}")
    if norm not in ("z", None) or eps < 0:
        raise ValueError(f"{op}: norm must be z or None, and eps at least 0, got {norm!r}, {eps}")
    state = (*q.shape[:2], q.shape[3], v.shape[3] + (norm == "z"))
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"{op}: initial_state must be {state}, got {tuple(initial_state.shape)}")
