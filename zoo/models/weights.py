"""Weight files: official files of every wrapping in, self-describing safetensors out; pickled code never runs."""

import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.files import write_file

WRAPPERS = ("params_ema", "params-ema", "params", "model_state_dict", "state_dict", "model", "net", "network")
PREFIXES = ("module.", "netG.", "network.", "_orig_mod.")
_DEEPEST = 8  # wrappers around a state dict; one that holds itself has no end
# Official files hold numpy scalars beside their tensors now and then; these types carry no code. Those that numpy 1
# wrote know the maker of scalars by an older name.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN = [np.dtype, _SCALAR, (_SCALAR, "numpy.core.multiarray.scalar")]
_PLAIN += [type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")]


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Read a state dict and, when the file describes itself, its header.

    Args:
        path: .safetensors, or .pth/.pt/.ckpt/.bin as PyTorch writes them, wrapped as the field does (`params_ema`,
            `state_dict`, `module.` prefixes, ...); of a file without these endings the content decides.

    Returns:
        Tensors on the CPU by name, and {"arch", "config", "variant", "version", "sha"} or None.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file is damaged, holds no tensors, or holds objects that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: {path} does not exist; give a file, a run folder or a name of `zoo list`")
    if path.suffix == ".safetensors" or _is_safetensors(path):
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_PLAIN), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # read or refused, both are said below
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported operand" in str(error):  # no pickle at all, such as a picture
            raise UserError(f"weights: {path} is damaged or no weight file; fetch it again") from error
        raise UserError(
            f"weights: {path} holds Python objects that could run code, so it was not opened; "
            "ask its author for a .safetensors file or a plain state dict"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(f"weights: {path} is damaged or no weight file; fetch it again") from error
    header = stored.get("zoo") if isinstance(stored, Mapping) else None
    state = stored.get("state_dict") if header is not None else None
    if isinstance(state, Mapping):  # a checkpoint of ours, which may hold more than the network
        stored = {name: tensor for name, tensor in state.items() if name.startswith("network.")}
    return unwrap(stored, str(path)), header


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as the format does: the length of a JSON object, below 100 MB, then that object."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("zoo", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"weights: {path} is damaged or no safetensors file; fetch it again") from error
    told = header.get("sha") if isinstance(header, dict) else None
    if told is not None and told != tensor_hash(tensors):
        raise UserError(f"weights: {path} is damaged, its numbers are not those that were written; fetch it again")
    return tensors, header


def unwrap(stored: object, name: str = "state dict") -> dict[str, Tensor]:
    """The bare state dict inside the wrappers and prefixes that the field's files come in.

    Raises:
        UserError: no tensors are found, or not under names.
    """
    for _ in range(_DEEPEST):
        if not isinstance(stored, Mapping):
            break
        inner = next((stored[w] for w in WRAPPERS if isinstance(stored.get(w), Mapping)), None)
        if inner is None and len(stored) == 1:
            inner = next(iter(stored.values()))
        if inner is None or isinstance(inner, Tensor):
            break
        stored = inner
    tensors = {k: v for k, v in stored.items() if isinstance(v, Tensor)} if isinstance(stored, Mapping) else {}
    if not tensors:
        raise UserError(f"weights: {name} holds no tensors; give a state dict or a file that carries one")
    if not all(isinstance(key, str) for key in tensors):
        raise UserError(f"weights: {name} holds tensors without names; give a state dict or a file that carries one")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def fault_of(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """What a tensor of a state dict holds that no weight of this dtype can be; None = it can be one."""
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return "no plain numbers"
    if tensor.is_floating_point() != dtype.is_floating_point:
        return f"{tensor.dtype} values, not {dtype}"
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        return "values that are NaN or infinite"
    return None


def write_weights(
    path: str | Path,
    network: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the weights of one of our networks as one self-describing safetensors file, atomically.

    Args:
        path: ends in .safetensors.
        network: made by `zoo.create` or `zoo.load` (or a class of zoo's own).
        dtype: storage type of floating tensors, None for their own.
        force: replace an existing file.

    Returns:
        The path.

    Raises:
        FileExistsError: the file is there and `force` is off.
        UserError: the network is none of zoo's, no space is left, or the place is not writable.
    """
    from zoo.models import family_of  # the table knows the name of the class

    family = family_of(network)
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    header = {
        "arch": family,
        "config": network.config,
        "variant": getattr(network, "variant", None),
        "version": 1,
        "sha": tensor_hash(state),
    }
    return write_file(path, save(state, metadata={"zoo": json.dumps(header)}), force=force)


def tensor_hash(state_dict: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors; the same in every file format."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
