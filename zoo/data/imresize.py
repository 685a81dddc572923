"""MATLAB-like bicubic `imresize`: the resampling behind every published super-resolution test set.

For output index j = 1..out the centre is u = j/s + (1 - 1/s)/2. Its weights are k(u - i) over the input indices i,
with the cubic kernel k of a = -0.5; when shrinking with antialiasing they are s k(s (u - i)). Weights are normalised
per output, and samples beyond an edge are mirrored with the edge pixel repeated. Neither clipped nor rounded.
Source: MATLAB's imresize as reproduced by basicsr/utils/matlab_functions.py; rows first, then columns.
"""

import math
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Image = TypeVar("Image", Tensor, np.ndarray)
BLOCK = 32  # outputs a matrix product: small enough to skip most zeros of the band, large enough for BLAS


def imresize(x: Image, scale: float, *, antialias: bool = True) -> Image:
    """Resize by `scale` on both axes as MATLAB does. Tensors are differentiable.

    Args:
        x: floating tensor (b, c, h, w) or (c, h, w), any range; or array (h, w) or (h, w, c), floating or uint8.
        scale: output size over input size, such as 1/2 or 4; the output has ceil(n * scale) pixels per axis.
        antialias: widen the kernel when shrinking, as MATLAB does by default.

    Returns:
        The same kind, layout and dtype. float64 is computed in float64, other tensors in float32; uint8 arrays are
        computed in float64 and rounded once at the end, as published low-resolution files are made.

    Raises:
        ValueError: wrong rank or dtype, an empty image, or a scale that is not positive.
    """
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"imresize: scale must be positive, got {scale}")
    if isinstance(x, Tensor):
        if x.ndim not in (3, 4) or not x.is_floating_point() or 0 in x.shape[-2:]:
            raise ValueError(
                f"imresize: a tensor must be floating (b, c, h, w) or (c, h, w), got {x.dtype} {tuple(x.shape)}"
            )
        wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
        return _along(_along(wide, -2, scale, antialias), -1, scale, antialias).to(x.dtype)
    if x.ndim not in (2, 3) or 0 in x.shape[:2] or not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)):
        raise ValueError(f"imresize: an array must be floating or uint8 (h, w[, c]), got {x.dtype} {x.shape}")
    chw = torch.from_numpy(np.array(x if x.ndim == 3 else x[..., None], dtype=_wide(x.dtype))).permute(2, 0, 1)
    y = imresize(chw, scale, antialias=antialias).permute(1, 2, 0).reshape(*_sizes(x, scale), *x.shape[2:]).numpy()
    return y.clip(0, 255).round().astype(np.uint8) if x.dtype == np.uint8 else y.astype(x.dtype)


def enlarged(lq: Tensor, upscale: int) -> Tensor:
    """An input at the size of its ground truth, in float64: the baseline that every restorer has to beat.

    Args:
        lq: (b, c, h, w) or (c, h, w), floating.
        upscale: gt size over lq size; 1 = `lq` itself.

    Returns:
        (b, c, h * upscale, w * upscale), dtype and device of `lq`, not clamped.
    """
    return lq if upscale == 1 else imresize(lq.cpu().double(), upscale).to(lq)  # not every device has float64


def _wide(dtype: np.dtype) -> type:
    return np.float32 if dtype in (np.float32, np.float16) else np.float64


def _sizes(x: np.ndarray, scale: float) -> tuple[int, int]:
    return _length(x.shape[0], scale), _length(x.shape[1], scale)


def _length(size: int, scale: float) -> int:
    return math.ceil(size * scale - 1e-9)  # 30 * 0.1 is 3.0000000000000004 in floating point


def _along(x: Tensor, axis: int, scale: float, antialias: bool) -> Tensor:
    parts = []
    for first, matrix in _bands(x.shape[axis], scale, antialias):
        rows = x.narrow(axis, first, matrix.shape[1])
        matrix = matrix.to(x)
        parts.append(matrix @ rows if axis == -2 else rows @ matrix.T)
    return torch.cat(parts, axis)


@lru_cache(maxsize=64)
def _bands(size: int, scale: float, antialias: bool) -> list[tuple[int, Tensor]]:
    """The weight matrix (out, size) as blocks of rows, each with its first used column: (first, (block, columns))."""
    # Plain memory, even when the first call comes from inside torch.inference_mode().
    with torch.inference_mode(False), torch.no_grad():
        shrink = scale if antialias and scale < 1 else 1.0
        width = 4 / shrink
        centre = torch.arange(1, _length(size, scale) + 1, dtype=torch.float64) / scale + 0.5 * (1 - 1 / scale)
        left = torch.floor(centre - width / 2)
        index = left[:, None] + torch.arange(math.ceil(width) + 2, dtype=torch.float64)  # out k
        weight = _cubic(shrink * (centre[:, None] - index))  # out k
        weight = weight / weight.sum(1, keepdim=True)
        period = (index.long() - 1) % (2 * size)
        column = torch.minimum(period, 2 * size - 1 - period)  # half-sample symmetric, for any overhang
        blocks = []
        for start in range(0, len(weight), BLOCK):
            some, where = weight[start : start + BLOCK], column[start : start + BLOCK]
            first, last = int(where.min()), int(where.max())
            matrix = torch.zeros(len(some), last - first + 1, dtype=torch.float64)
            blocks.append((first, matrix.scatter_add_(1, where - first, some)))
        return blocks


def _cubic(t: Tensor) -> Tensor:
    t = t.abs()
    near = (1.5 * t - 2.5) * t * t + 1
    far = ((-0.5 * t + 2.5) * t - 4) * t + 2
    return torch.where(t <= 1, near, torch.where(t <= 2, far, torch.zeros_like(t)))
