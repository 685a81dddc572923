"""What the words cpu, cuda, cuda:0 and auto mean on this machine."""

from typing import TYPE_CHECKING

from zoo.errors import UserError

if TYPE_CHECKING:
    import torch


def device_word(text: str) -> str:
    """`text` itself, when it is one of the words; torch is not imported.

    Raises:
        UserError: it is none.
    """
    kind, colon, number = text.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and (kind != "cuda" or not number.isdecimal())):
        raise UserError(f"device must be cpu, cuda, cuda:0 or auto, got {text!r}")
    return text


def torch_device(text: str) -> "torch.device":
    """The device that a word means here; auto = CUDA where there is one.

    Raises:
        UserError: it is no word for a device, or this machine has no such device.
    """
    import torch

    kind, _, number = device_word(text).partition(":")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        kind = "cuda" if found else "cpu"
    elif kind == "cuda" and int(number or 0) >= found:
        raise UserError(f"device {text}: torch sees {found} CUDA devices here; use cpu, or run `zoo doctor`")
    return torch.device(f"{kind}:{int(number)}" if number else kind)
