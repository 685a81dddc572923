"""JPEG: the real encoder, and a batched imitation in plain torch that gradients pass through."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

# Quantisation tables of the standard, annex K. The rows of the luma table are its columns there: the original swaps
# them, and published models were trained with it.
_LUMA = (
    (16, 12, 14, 14, 18, 24, 49, 72),
    (11, 12, 13, 17, 22, 35, 64, 92),
    (10, 14, 16, 22, 37, 55, 78, 95),
    (16, 19, 24, 29, 56, 64, 87, 98),
    (24, 26, 40, 51, 68, 81, 103, 112),
    (40, 58, 57, 87, 109, 104, 121, 100),
    (51, 60, 69, 80, 103, 113, 120, 103),
    (61, 55, 56, 62, 77, 92, 101, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # 99 everywhere else


def jpeg(x: Tensor, quality: int) -> Tensor:
    """Encode as baseline JPEG (libjpeg, 4:2:0) and decode.

    Args:
        x: (c, h, w) or (b, c, h, w) in [0, 1], c = 1 or 3 (RGB); clamped and rounded to 8 bits.
        quality: 1 (worst) to 100.

    Returns:
        The same shape and dtype, multiples of 1/255.

    Raises:
        ValueError: wrong rank, or neither 1 nor 3 channels.
    """
    if x.ndim == 4:
        return torch.stack([jpeg(image, quality) for image in x])
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"jpeg: x must be (c, h, w) or (b, c, h, w) with 1 or 3 channels, got {tuple(x.shape)}")
    pixels = (x.detach().double().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if x.shape[0] == 1 else pixels).save(buffer, "JPEG", quality=quality)
    decoded = np.array(Image.open(buffer)).reshape(pixels.shape)
    return torch.from_numpy(decoded).permute(2, 0, 1).contiguous().to(x.device, x.dtype) / 255


def diffjpeg(x: Tensor, quality: Tensor | float) -> Tensor:
    """Imitate JPEG in one batch; gradients pass through the rounding of coefficients as if it were not there.

    BT.601 full range, chroma halved by 2x2 means and enlarged by repetition, tables of the standard times
    50/q (q < 50) or 2 - q/50, zero padding to multiples of 16 at the bottom and right.

    Args:
        x: (b, 3, h, w) in [0, 1], or (b, 1, h, w), where chroma is gray.
        quality: in (0, 100], one for all or (b,); it may be fractional and is left unchanged.

    Returns:
        The same shape, in [0, 1].

    Raises:
        ValueError: wrong shapes.

    Source: basicsr/utils/diffjpeg.py (there the quality tensor is overwritten, and 100 gives no numbers).
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"diffjpeg: x must be (b, 3, h, w) or (b, 1, h, w), got {tuple(x.shape)}")
    if x.shape[1] == 1:
        return diffjpeg(x.expand(-1, 3, -1, -1), quality)[:, :1]
    quality = torch.as_tensor(quality, dtype=x.dtype, device=x.device).expand(x.shape[0])
    factor = torch.where(quality < 50, 50 / quality, (2 - quality / 50).clamp(min=1e-3)).view(-1, 1, 1, 1, 1)  # not 0
    h, w = x.shape[-2:]
    padded = F.pad(x, (0, -w % 16, 0, -h % 16)) * 255
    luma, *chroma = _ycc(padded)
    luma = _coded(luma, torch.tensor(_LUMA).to(x), factor)
    table = torch.full((8, 8), 99).to(x)
    table[:4, :4] = torch.tensor(_CHROMA_CORNER).to(x)
    planes = [luma]
    for plane in chroma:
        halved = _coded(F.avg_pool2d(plane, 2), table, factor)
        planes.append(halved.repeat_interleave(2, -1).repeat_interleave(2, -2))
    y, cb, cr = planes[0], planes[1] - 128, planes[2] - 128
    rgb = torch.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], 1)
    return rgb.clamp(0, 255)[..., :h, :w] / 255


def _ycc(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Full-range YCbCr planes (b, h, w) of RGB in 0-255."""
    r, g, b = x.unbind(1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return y, 128 - 0.168736 * r - 0.331264 * g + 0.5 * b, 128 + 0.5 * r - 0.418688 * g - 0.081312 * b


def _coded(plane: Tensor, table: Tensor, factor: Tensor) -> Tensor:
    """Round the cosine coefficients of every 8x8 block of (b, h, w) to multiples of table * factor."""
    b, h, w = plane.shape
    k = torch.arange(8, device=plane.device, dtype=torch.float64)
    dct = torch.cos((2 * k + 1) * k[:, None] * torch.pi / 16) / 2  # frequency, place
    dct[0] /= 2**0.5
    dct = dct.to(plane.dtype)
    blocks = plane.reshape(b, h // 8, 8, w // 8, 8).transpose(2, 3) - 128  # b hb wb 8 8
    step = table * factor
    levels = dct @ blocks @ dct.T / step
    levels = levels + (levels.round() - levels).detach()
    blocks = dct.T @ (levels * step) @ dct + 128
    return blocks.transpose(2, 3).reshape(b, h, w)
