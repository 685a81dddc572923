"""The sums over keys and values, and what becomes of them before queries read them."""

from typing import NamedTuple

from torch import Tensor


class LinearState(NamedTuple):
    """What queries need to know of keys and values; the parts of two sets of tokens add up.

    Attributes:
        kv: sum of f(k) v^T, (b, heads, d, e), or (b, heads, segments, d, e) with `cu_seqlens`; float32 or wider.
        k: sum of f(k), (b, heads, d) or (b, heads, segments, d); dtype of `kv`.
        keys: how many they were, () or (segments,); dtype of `kv`.
    """

    kv: Tensor
    k: Tensor
    keys: Tensor


def between(
    kv: Tensor,
    z: Tensor,
    divisors: tuple[Tensor | float, Tensor | float | None],
    segmented: bool,
    before: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Add earlier sums and divide.

    Args:
        kv: sums of this call, (b, heads, segments, d, e), one segment if not `segmented`.
        z: likewise, (b, heads, segments, d).
        divisors: of kv and of z, numbers or one a segment; None where nothing is normalised.
        segmented: whether the axis of segments is the caller's.
        before: sums to add.

    Returns:
        kv and z as the caller sees them; then both divided, always with the axis of segments.
    """
    if not segmented:
        kv, z = kv.squeeze(2), z.squeeze(2)
    if before is not None:
        kv, z = kv + before[0], z + before[1]
    shares = _divide(kv, divisors[0], 2), None if divisors[1] is None else _divide(z, divisors[1], 1)
    if not segmented:
        shares = shares[0].unsqueeze(2), None if shares[1] is None else shares[1].unsqueeze(2)
    return kv, z, *shares


def _divide(sums: Tensor, divisor: Tensor | float, inner: int) -> Tensor:
    return sums / (divisor[(..., *[None] * inner)] if isinstance(divisor, Tensor) else divisor)
