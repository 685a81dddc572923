"""Selective state-space scan: a linear recurrence a channel, whose step and directions the tokens choose.

For every channel e, with a state h of s values and the tokens in the order in which they are visited:

    dt_t = softplus(delta_t + delta_bias)                    without `delta_softplus` the sum itself
    h_t  = exp(dt_t A) h_{t-1} + dt_t u_t B_t
    y_t  = (sum_s C_t h_t + D u_t) silu(z_t)

The softplus is the identity above 20, the state and all sums are float32 or wider. With `orders` the channels fall into
K equal parts, and part k visits the tokens in its own order. Tokens are read from and written to their own places, so
that K directions through an image need no permuted copies.

Source: Mamba (Gu & Dao 2023), section 3; VMamba (Liu et al. 2024) for several orders.
"""

from math import lcm

import torch
from torch import Tensor

from zoo.kernels.impls import pick


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    orders: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk: int | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan the tokens. Differentiable in every float tensor; any strides.

    Args:
        u: what is scanned, (b, e, n); or (b, e / K, n), which all K orders read.
        delta: step sizes, (b, e, n), before bias and softplus.
        A: decay rates, real, (e, s); negative where the state shall fade.
        B: input weights, (b, s, n); (b, groups, s, n), where each group serves e / groups neighbouring channels; or
            the same for all tokens, (e, s).
        C: output weights, shaped by the same rule as B.
        D: weight of the direct way, (e,).
        z: gate, shaped by the same rule as `u`.
        delta_bias: added to `delta`, (e,).
        delta_softplus: whether step sizes pass through softplus.
        orders: integers (K, n), K a divisor of e; row k lists the tokens in the order in which the k-th part of the
            channels visits them, each once. Raster order when None. On a GPU the numbers themselves are not checked.
        initial_state: state before the first step, (b, e, s); zero when None.
        return_state: whether the state after the last step is returned too.
        chunk: tokens between the states that are kept for the backward, which computes the others anew; a power of
            two for "triton". Chosen by shape when None. The result does not depend on it.
        impl: "reference", "torch", "triton", or "auto" (Triton on CUDA, torch elsewhere).

    Returns:
        (b, e, n), dtype of `u`, each token at its own place; with `return_state` also the state (b, e, s) in float32
        or wider.

    Raises:
        ValueError: shapes, dtypes or orders that do not fit together, or an unknown `impl`.
    """
    if delta.ndim != 3 or A.ndim != 2 or A.shape[0] != delta.shape[1] or 0 in A.shape:
        raise ValueError(
            f"selective_scan: delta must be (b, e, n) and A (e, s), e and s at least 1, got {tuple(delta.shape)}, "
            f"{tuple(A.shape)}"
        )
    (b, e, n), s = delta.shape, A.shape[1]
    paths = 1 if orders is None else _check_orders(orders, e, n)
    for name, x in (("u", u), ("z", z)):
        if x is not None and x.shape not in ((b, e, n), (b, e // paths, n)):
            shared = f" or {(b, e // paths, n)}" if paths > 1 else ""
            raise ValueError(f"selective_scan: {name} must be {(b, e, n)}{shared} like delta, got {tuple(x.shape)}")
    groups = lcm(paths, *(_check_weights(name, x, b, e, n, s) for name, x in (("B", B), ("C", C))))
    if e % groups:
        raise ValueError(
            f"selective_scan: e must be a multiple of the groups of B and C and of K, got e {e}, B {tuple(B.shape)}, "
            f"C {tuple(C.shape)}, K {paths}"
        )
    for name, x, shape in (
        ("D", D, (e,)),
        ("delta_bias", delta_bias, (e,)),
        ("initial_state", initial_state, (b, e, s)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"selective_scan: {name} must be {shape}, got {tuple(x.shape)}")
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, x in (tensors | {"initial_state": initial_state}).items():
        if x is not None and not x.is_floating_point():
            raise ValueError(f"selective_scan: {name} must be real floating point, got {x.dtype}")
    impl = pick("selective_scan", impl, u)
    if chunk is not None and (chunk < 1 or (impl == "triton" and chunk & (chunk - 1))):
        rule = "a power of two" if impl == "triton" else "at least 1"
        raise ValueError(f"selective_scan: chunk must be {rule}, got {chunk}")
    if impl == "reference":
        from .reference import forward
    elif impl == "torch":
        from .torch_impl import forward
    else:
        from .triton_impl import forward

    def tokens(x: Tensor) -> Tensor:  # b r d n, without a copy where paths share
        return x.unflatten(1, (-1, e // paths)).expand(-1, paths, -1, -1).reshape(b, groups, e // groups, n)

    def weights(x: Tensor) -> Tensor:  # b r s n, or r d s
        if x.ndim == 2:
            return x.unflatten(0, (groups, -1))
        x = x[:, None] if x.ndim == 3 else x
        return x[:, :, None].expand(-1, -1, groups // x.shape[1], -1, -1).flatten(1, 2)

    def channels(x: Tensor, axis: int = 0) -> Tensor:  # r d, r d s, or b r d s
        return x.unflatten(axis, (groups, -1))

    y, state = forward(
        tokens(u),
        tokens(delta),
        channels(A),
        weights(B),
        weights(C),
        None if D is None else channels(D),
        None if z is None else tokens(z),
        None if delta_bias is None else channels(delta_bias),
        None if initial_state is None else channels(initial_state, 1),
        None if orders is None else orders.long().repeat_interleave(groups // paths, 0),  # r n
        delta_softplus,
        chunk,
    )
    y = y.flatten(1, 2)  # b e n
    return (y, state.flatten(1, 2)) if return_state else y


def _check_orders(orders: Tensor, e: int, n: int) -> int:
    if orders.ndim != 2 or orders.shape[1] != n or not len(orders) or e % len(orders):
        raise ValueError(
            f"selective_scan: orders must be (K, {n}) with K a divisor of e {e}, got {tuple(orders.shape)}"
        )
    if orders.is_floating_point() or orders.dtype == torch.bool:
        raise ValueError(f"selective_scan: orders must be integers, got {orders.dtype}")
    if not orders.is_cuda and not torch.compiler.is_compiling():  # there, looking would stop the queue or the trace
        visited = orders.sort(1).values == torch.arange(n, device=orders.device)
        if not visited.all():
            row = int(visited.all(1).int().argmin())
            raise ValueError(
                f"selective_scan: orders must visit each of {n} tokens once, got another order in row {row}"
            )
    return len(orders)


def _check_weights(name: str, x: Tensor, b: int, e: int, n: int, s: int) -> int:
    """Returns the number of groups."""
    groups = x.shape[1] if x.ndim == 4 else 1
    if x.shape not in ((e, s), (b, s, n), (b, groups, s, n)) or not groups:
        raise ValueError(
            f"selective_scan: {name} must be {(b, s, n)}, {(b, 'groups', s, n)} or {(e, s)}, got {tuple(x.shape)}"
        )
    return groups
