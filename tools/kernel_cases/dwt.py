"""Wavelet transforms of images: one, many small ones, many large ones, against PyWavelets and a grouped convolution."""

from collections.abc import Iterator

import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case, by_impl, on_gpu
from zoo.kernels.dwt import dwt, idwt

SHAPES = (
    ((1, 3, 256, 256), "haar", "zero"),
    ((4, 48, 64, 64), "haar", "zero"),
    ((1, 3, 256, 256), "db4", "zero"),
    ((4, 48, 64, 64), "db4", "zero"),
    ((4, 64, 256, 256), "haar", "symmetric"),
    ((4, 64, 256, 256), "db4", "symmetric"),
)


def compiled(dtype: torch.dtype, head_dim: int) -> None:
    """Both axes in one pass (haar, db4), and axis by axis (db10), there and back with gradients."""
    for wave, mode in (("haar", "symmetric"), ("db4", "symmetric"), ("db10", "periodization")):
        x = torch.zeros(2, 3, 32, head_dim, dtype=dtype, requires_grad=True)
        y = idwt(dwt(x, wave, mode=mode, impl="triton"), wave, mode=mode, impl="triton")
        torch.autograd.grad(y.sum(), x)


def timed(quick: bool) -> Iterator[Case]:
    """There, there with the gradient, and back."""
    for sizes, wave, mode in SHAPES[:3] if quick else SHAPES:
        yield from cases(sizes, wave, mode)


def cases(sizes: tuple[int, ...], wave: str, mode: str) -> Iterator[Case]:
    """One wavelet on images (b, c, h, w) of even sides."""
    x, shape = torch.randn(sizes), f"{sizes} {wave} {mode}"
    there = lambda impl, x: dwt(x, wave, mode=mode, impl=impl)
    back = lambda impl, bands: idwt(bands, wave, mode=mode, impl=impl)
    bands = there("torch", x)
    # Two filters an axis: along the columns of all samples, then along the rows of the bands of these.
    flops = 4.0 * pywt.Wavelet(wave).dec_len * (x[..., 0].numel() * bands.shape[4] + bands.numel() / 2)
    size = float(x.nbytes + bands.nbytes)
    peers, inverse = {}, {}
    if mode == "zero":
        peers["grouped conv2d"] = lambda x: by_convolution(x, wave)
    if not on_gpu() and x.dtype == torch.float32:
        peers["pywt"] = lambda x: by_pywt(x, wave, mode)
        inverse["pywt"] = lambda bands: from_pywt(bands, wave, mode)
    trained = (2 * flops, 2 * size)
    yield Case("dwt", shape, (x,), by_impl(there), peers, flops, size, trained, frozenset(["pywt"]))
    yield Case("dwt, inverse", shape, (bands,), by_impl(back), inverse, flops, size)


def by_convolution(x: Tensor, wave: str) -> Tensor:
    """All bands of zero-padded images by one convolution, as published models do it."""
    lo, hi = (torch.tensor(taps[::-1], dtype=x.dtype, device=x.device) for taps in pywt.Wavelet(wave).filter_bank[:2])
    bank = torch.stack([torch.outer(a, b) for a, b in ((lo, lo), (hi, lo), (lo, hi), (hi, hi))])[:, None]  # 4 1 k k
    y = F.conv2d(x, bank.repeat(x.shape[1], 1, 1, 1), stride=2, padding=len(lo) - 2, groups=x.shape[1])
    return y.unflatten(1, (x.shape[1], 4))


def by_pywt(x: Tensor, wave: str, mode: str) -> Tensor:
    """All bands in one tensor, in our order; putting them side by side is a part of the time."""
    approx, details = pywt.dwt2(x.numpy(), wave, mode)
    return torch.stack([torch.from_numpy(band) for band in (approx, *details)], 2)


def from_pywt(bands: Tensor, wave: str, mode: str) -> Tensor:
    """Images of even sizes."""
    approx, *details = bands.numpy().transpose(2, 0, 1, 3, 4)
    return torch.from_numpy(pywt.idwt2((approx, details), wave, mode))
