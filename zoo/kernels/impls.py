"""Which implementation answers a call."""

from torch import Tensor


def pick(op: str, impl: str, x: Tensor, *, triton: bool = True) -> str:
    """Resolve "auto" for tensor `x`; an explicit ask is returned as it is, and never falls back.

    Args:
        op: name of the operation, for the error.
        impl: "auto", "reference", "torch" or "triton".
        x: the tensor whose device decides.
        triton: whether the op's Triton path supports this call.

    Raises:
        ValueError: `impl` is unknown, or "triton" where the op has no such path.
    """
    if impl == "auto":
        return "triton" if triton and x.is_cuda else "torch"
    if impl == "triton" and not triton:
        raise ValueError(f"{op}: impl must be auto, reference or torch for this call, got 'triton'")
    if impl not in ("reference", "torch", "triton"):
        raise ValueError(f"{op}: impl must be auto, reference, torch or triton, got {impl!r}")
    return impl
