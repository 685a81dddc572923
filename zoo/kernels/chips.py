"""Which GPU a launch is for; block shapes, warps and stages are data by chip, in `tuning.py` of each op."""

import os
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Settings = TypeVar("Settings")

# Read where Triton reads it, when kernels are imported. The interpreter multiplies the bit patterns of bf16 without a
# word, and its casts to bf16 cut digits off: where this holds, kernels cast both operands of tl.dot to float32, and
# round before they store.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def chip(x: Tensor) -> int:
    """Compute capability of the GPU that holds `x`, such as 80 (A100), 89 (4090) or 90 (H100); 80 where none does."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def tuned(table: Mapping[int, Settings], x: Tensor) -> Settings:
    """What was tuned for the newest chip that is not newer than the one that holds `x`; else for the oldest.

    Args:
        table: settings by compute capability; not empty.
        x: the tensor whose device decides.
    """
    own = chip(x)
    return table[max((key for key in table if key <= own), default=min(table))]
