"""Filter banks by name, and the lengths they give; the only file that knows pywt."""

from functools import lru_cache

import pywt
import torch
from torch import Tensor

MODES = (
    "zero",
    "constant",
    "symmetric",
    "reflect",
    "periodic",
    "smooth",
    "antisymmetric",
    "antireflect",
    "periodization",
)


def filter_bank(wave: str) -> Tensor:
    """Read a bank of four filters of one even length, (4, k) float64: low and high to take apart, the same to rebuild.

    Raises:
        ValueError: pywt has no discrete wavelet of this name.
    """
    return _compiled(wave) if torch.compiler.is_compiling() else _bank(wave)


@lru_cache(maxsize=256)
def _bank(wave: str) -> Tensor:
    if wave not in pywt.wavelist(kind="discrete"):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"dwt: wave must be a discrete wavelet of pywt such as haar or db4, got {wave!r}")
    with torch.inference_mode(False):  # the cached tensor also serves training
        bank = pywt.Wavelet(wave).filter_bank  # pyright: ignore[reportAttributeAccessIssue]
        return torch.tensor(bank, dtype=torch.float64, device="cpu")


@torch.library.custom_op("zoo::filter_bank", mutates_args=())  # torch.compile cannot read pywt
def _compiled(wave: str) -> Tensor:
    return _bank(wave).clone()


@_compiled.register_fake
def _(wave: str) -> Tensor:
    return torch.empty(_bank(wave).shape, dtype=torch.float64, device="cpu")


def band_size(size: int, taps: int, mode: str) -> int:
    """Length of the bands of a signal of length `size`."""
    return (size + 1) // 2 if mode == "periodization" else (size + taps - 1) // 2


def signal_size(size: int, taps: int, mode: str) -> int:
    """Length of the signal rebuilt from bands of length `size`: one more than it was where that was odd."""
    return 2 * size if mode == "periodization" else 2 * size - taps + 2
