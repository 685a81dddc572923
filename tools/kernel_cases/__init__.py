"""What is compiled and timed of each op: one file an op, which defines `compiled` and `timed`."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One problem for the bench.

    Attributes:
        op: row name, such as "linear_attention" or "linear_attention, backward too".
        shape: sizes as text.
        ours: implementation -> call.
        peers: what others would do -> call, with the same result.
        exact: the result in float64.
        flops: multiplications and additions that the result needs; 0 = does not say.
        bytes: that must be read and written at least; 0 = does not say.
    """

    op: str
    shape: str
    ours: dict[str, Callable[[], Tensor]]
    peers: dict[str, Callable[[], Tensor]]
    exact: Callable[[], Tensor]
    flops: float = 0.0
    bytes: float = 0.0
