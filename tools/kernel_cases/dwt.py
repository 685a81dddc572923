"""Wavelet transforms of images: one, many small ones, many large ones, against PyWavelets and a grouped convolution."""

from collections.abc import Callable, Iterator

import pywt
import torch
from torch import Tensor
from torch.nn import functional as F

from kernel_cases import Case
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
    there = lambda x, impl="torch": dwt(x, wave, mode=mode, impl=impl)
    back = lambda y, impl="torch": idwt(y, wave, mode=mode, impl=impl)
    bands = there(x)
    # Two filters an axis: along the columns of all samples, then along the rows of the bands of these.
    flops = 4.0 * pywt.Wavelet(wave).dec_len * (x[..., 0].numel() * bands.shape[4] + bands.numel() / 2)
    size = float(x.element_size() * (x.numel() + bands.numel()))
    impls = ("triton", "torch") if x.is_cuda else ("torch",)
    convolution = {"grouped conv2d": lambda x: by_convolution(x, wave)} if mode == "zero" else {}
    others, inverse = dict(convolution), {}
    if x.device.type == "cpu" and x.dtype == torch.float32:
        others["pywt.dwt2"] = lambda x: by_pywt(x, wave, mode)
        inverse["pywt.idwt2"] = lambda y: from_pywt(y, wave, mode)

    def on(given: Tensor, calls: dict[str, Callable[[Tensor], Tensor]]) -> dict[str, Callable[[], Tensor]]:
        return {name: lambda call=call: call(given) for name, call in calls.items()}

    ours = on(x, {impl: lambda x, impl=impl: there(x, impl) for impl in impls})
    yield Case("dwt", shape, ours, on(x, others), lambda: there(x.double()), flops, size)

    ours = on(bands, {impl: lambda y, impl=impl: back(y, impl) for impl in impls})
    yield Case("dwt, inverse", shape, ours, on(bands, inverse), lambda: back(bands.double()), flops, size)

    grad, leaf, wide = torch.randn_like(bands), x.clone().requires_grad_(), x.double().requires_grad_()
    ours = on(leaf, {impl: lambda x, impl=impl: gradient(lambda x: there(x, impl), x, grad) for impl in impls})
    peers = on(leaf, {name: lambda x, call=call: gradient(call, x, grad) for name, call in convolution.items()})
    exact = lambda: gradient(there, wide, grad.double())
    yield Case("dwt, backward too", shape, ours, peers, exact, 2 * flops, 2 * size)


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


def gradient(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward."""
    return torch.autograd.grad(call(x), x, grad)[0]
