"""Restorers as files that run without zoo: torch.export (.pt2) and ONNX (.onnx), each compared with the network.

Both take (1, c, h, w) in [0, 1] with sides that are multiples of the network's and return (1, c, h*upscale, w*upscale).
"""

import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from zoo.errors import UserError
from zoo.files import write_file
from zoo.kernels.window_attention import plain, torch_impl  # noqa: F401 (registers the op)
from zoo.models import needs
from zoo.pipelines.tiling import evaluating

ENDINGS = (".pt2", ".onnx")
TOLERANCE = 1e-4  # largest difference from the network, relative to its largest output
_MOST = 4096  # side up to which sizes are promised


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: where it lies.
        sizes: (h, w) of the inputs that were compared.
        error: the largest difference from the network, relative to the largest output.
        own: how far the network differs from itself when its input is rounded otherwise, likewise.
        dynamic: whether other sizes may go in.
        multiple: of both sides.
    """

    path: Path
    sizes: tuple[tuple[int, int], ...]
    error: float
    own: float
    dynamic: bool
    multiple: int


def export(
    network: nn.Module,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    tolerance: float = TOLERANCE,
    force: bool = False,
) -> Exported:
    """Write a restorer in another format; the file is put in place only when it computes what the network does.

    Args:
        network: one of zoo's restorers, float32, on the CPU.
        path: ends in .pt2 or .onnx.
        size: height and width of the only input that it shall take; None = any multiples of the network's, which
            those that look at the whole image at once (needs().whole) do not offer.
        tolerance: the largest difference from the network that is accepted, relative to the largest output.
        force: replace a file that exists.

    Raises:
        FileExistsError: `path` exists and `force` is False.
        FileNotFoundError: packages for ONNX are missing.
        UserError: an unknown ending, an impossible size, or the file computes something else.
    """
    path, facts = Path(path), needs(network)
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: zoo exports {' and '.join(ENDINGS)}; give the output one of these endings")
    if path.exists() and not force:
        raise FileExistsError(f"{path}: exists already; pass --force to replace it, or name another output")
    step = facts.multiple
    if size is None and facts.whole:
        raise UserError(f"export: {type(network).__name__} is exported for one size; give it, such as --size 256x256")
    if size is not None and (min(size) < 1 or any(side % step for side in size)):
        raise UserError(f"export: both sides must be multiples of {step} for this model, got {size[0]}x{size[1]}")
    if path.suffix == ".onnx":
        _check_onnx()
    base = -(-64 // step) * step
    shapes = [size] if size is not None else [(base, base + step), (base + 2 * step, base)]
    with evaluating(network):
        program = _program(network, torch.zeros(1, facts.in_channels, *shapes[0]), step, dynamic=size is None)
        data, run = _portable(program) if path.suffix == ".pt2" else _onnx(program)
        found = [_errors(network, run, facts.in_channels, shape) for shape in shapes]
    error, own = (max(some) for some in zip(*found, strict=True))
    if not error <= tolerance:
        remedy = "report this as a bug"
        if own:  # of equal values, rounding decides which comes first
            remedy = f"it sorts pixels and differs from itself by {own:.1e}: take .pt2, or --tolerance {2 * error:.0e}"
        raise UserError(f"{path}: not written, as it differs from the network by {error:.1e}; {remedy}")
    write_file(path, data, force=force)
    return Exported(path, tuple(shapes), error, own, size is None, step)


def _program(network: nn.Module, image: Tensor, step: int, *, dynamic: bool) -> ExportedProgram:
    """The graph of the network, with plain operations instead of ours."""
    shapes = None
    if dynamic:
        sides = [Dim(name, min=2, max=_MOST // step) for name in ("rows", "columns")]
        shapes = ({2: step * sides[0], 3: step * sides[1]},) if step > 1 else ({2: sides[0], 3: sides[1]},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (image,), dynamic_shapes=shapes, strict=False)
        return program.run_decompositions({torch.ops.zoo.window_attention.default: plain.window_attention})


def _portable(program: ExportedProgram) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return stream.getvalue(), torch.export.load(stream).module()


def _onnx(program: ExportedProgram) -> tuple[bytes, Callable[[Tensor], Tensor]]:
    import onnxruntime  # pyright: ignore[reportMissingImports] (of an extra)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of packages that are not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = program.run_decompositions({torch.ops.aten.sort.stable: _sorted})
        made = torch.onnx.export(
            program, input_names=["lq"], output_names=["restored"], dynamo=True, verbose=False, optimize=True
        )
    data = made.model_proto.SerializeToString()  # pyright: ignore[reportOptionalMemberAccess] (a program, as dynamo=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {"lq": image.numpy()})[0]))

    return data, run


def _sorted(x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """What ONNX has for it, TopK, is stable: of equal values the one with the lower index comes first."""
    values, places = torch.sort(x, dim=dim, descending=descending)
    return values, places


def _errors(
    network: nn.Module, run: Callable[[Tensor], Tensor], channels: int, shape: Sequence[int]
) -> tuple[float, float]:
    """The largest differences on smooth noise, relative to the largest output: of the file, of the network itself."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, channels, 8, 8, generator=draw)
    image = nn.functional.interpolate(coarse, size=tuple(shape), mode="bicubic").clamp(0, 1)
    image = (image + 0.05 * torch.rand(image.shape, generator=draw)).clamp(0, 1)
    expected, found = network(image), run(image)
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf"), 0.0
    rounded = [image * (1 + 1e-7 * torch.randn(image.shape, generator=draw)) for _ in range(4 * needs(network).whole)]
    own = [float((network(other) - expected).abs().max()) for other in rounded]
    top = float(expected.abs().max())
    return float((found - expected).abs().max()) / top, max(own, default=0.0) / top


def _check_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError as error:
            raise FileNotFoundError(
                f"ONNX files need {name}, which is not installed; "
                "run pip install 'zoo[export]' (in a checkout: pip install -e '.[export]')"
            ) from error
