"""What is compiled and timed of each op: one file an op, which defines `compiled` and `timed`."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One problem for the bench: what is computed of `inputs`, and by whom. Every call takes the inputs in order.

    Attributes:
        op: row name, such as "linear_attention".
        shape: sizes as text.
        inputs: float tensors; those of the gradients where `trained` is given.
        ours: implementation -> call, the one that all are compared with first; "torch" is among them; see `by_impl`.
        peers: what others would do -> call.
        flops: multiplications and additions that the result needs; 0 = does not say.
        bytes: that must be read and written at least; 0 = does not say.
        trained: both for the result and the gradients of all inputs; None = only the result is timed.
        untrained: peers without a backward.
    """

    op: str
    shape: str
    inputs: tuple[Tensor, ...]
    ours: dict[str, Call]
    peers: dict[str, Call]
    flops: float = 0.0
    bytes: float = 0.0
    trained: tuple[float, float] | None = None
    untrained: frozenset[str] = field(default=frozenset())


def on_gpu() -> bool:
    """Whether the bench times a GPU."""
    return torch.get_default_device().type == "cuda"


def by_impl(call: Callable[..., Tensor]) -> dict[str, Call]:
    """A call for each implementation that is worth a row; its name is the first argument."""
    return {impl: partial(call, impl) for impl in (("triton", "torch") if on_gpu() else ("torch",))}


def installed(name: str) -> ModuleType | None:
    """A peer's package, if it can be imported. All of them need a GPU."""
    try:
        return importlib.import_module(name) if on_gpu() else None
    except ImportError:
        return None


def flex(sees: Callable[..., Tensor], queries: int, keys: int, block: int = 128, heads: int | None = None) -> Call:
    """Compiled flex_attention of q, k, v where `sees(batch, head, query, key)`; the mask is made once, beforehand.

    Args:
        sees: a mask_mod of flex_attention.
        queries: their number.
        keys: their number.
        block: side of the blocks that are skipped.
        heads: number of heads if the mask differs between them.
    """
    mask = create_block_mask(sees, None, heads, queries, keys, torch.get_default_device(), BLOCK_SIZE=block)
    return partial(torch.compile(flex_attention, dynamic=False), block_mask=mask)
