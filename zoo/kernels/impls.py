"""Which implementation answers a call."""

import torch
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


def eager(*tensors: Tensor | None) -> bool:
    """Whether nothing traces a call and nothing wants its gradient: then the function behind a registered op will do.

    The first call of an op registered in Python imports torch's compiler: seconds, and 150 MiB that stay.
    """
    if torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors)
