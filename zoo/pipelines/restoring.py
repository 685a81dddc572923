"""A picture in, the restored picture out: channels, transparency, depth and precision around `tiling.restore`."""

import logging
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import __version__, shipped
from zoo.errors import UserError
from zoo.media import Changed, Picture, change_video, from_pil, to_pil
from zoo.models import load, needs
from zoo.models.weights import tensor_hash
from zoo.pipelines import tiling
from zoo.pipelines.devices import torch_device

log = logging.getLogger(__name__)

DEFAULT = "hat-tiny-x2"


def restore(
    image: Image.Image | Tensor,
    model: str | Path | nn.Module = DEFAULT,
    *,
    device: str = "auto",
    dtype: str = "float32",
    tile: int | str | None = "auto",
    overlap: int | None = None,
    padding: str = "reflect",
    ensemble: bool = False,
    progress: tiling.TileProgress | None = None,
) -> Image.Image | Tensor:
    """Restore one image, or a batch of equally large ones.

    Gray stays gray, transparency and colour profile are kept, and EXIF orientation is applied.

    Args:
        image: a Pillow image of any mode, or a floating tensor (b, c, h, w) in [0, 1] with c = 1 or 3 (RGB).
        model: a shipped name, a weight file, a run folder, or a network (used where it is unless `device` is given).
        device: "cpu", "cuda", "cuda:0" or "auto" (CUDA where there is one).
        dtype: "float32", or "bfloat16" or "float16" where needs(network).dtypes allows it; sums stay in float32.
        tile: side of the tiles in pixels, None = never tile, "auto" = only when memory is short.
        overlap: context around each tile in pixels; None = what the network needs.
        padding: "reflect", or "mirror_always" as the script for CRAFT's tables; see `zoo.pipelines.tiling.pad`.
        ensemble: restore all eight flips and turns and take the mean: eight times the work, often 0.1 dB.
        progress: called with the numbers of tiles done and in all.

    Returns:
        What was given: a Pillow image (L, LA, RGB or RGBA; 16-bit gray stays so), or a tensor (b, c, h * upscale,
        w * upscale) in [0, 1] on the device and in the dtype of `image`.

    Raises:
        FileNotFoundError: the weights are not here; the message says where to get them.
        UserError: unknown model, refused dtype, memory that suffices for no tile, or a result that is not a number.
    """
    network = prepare(model, device=device, dtype=dtype)
    how: dict[str, Any] = {"tile": tile, "overlap": overlap, "padding": padding, "ensemble": ensemble}
    how |= {"dtype": dtype, "progress": progress}
    if isinstance(image, Tensor):
        return restore_tensor(network, image, **how)
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise UserError(f"restore takes a Pillow image or a tensor, got {kind}; open files with PIL.Image.open")
    picture = from_pil(image)
    return to_pil(restore_picture(network, picture, **how))


def prepare(
    model: str | Path | nn.Module, *, device: str = "auto", dtype: str = "float32", compiled: bool = False
) -> nn.Module:
    """The network that `model` means, on its device; the dtype is checked, not applied.

    Args:
        model: as for `restore`.
        device: as for `restore`.
        dtype: as for `restore`.
        compiled: let torch.compile make it faster: worth it for many images or frames of one size.

    Raises:
        FileNotFoundError: the weights are not here.
        UserError: unknown model, refused dtype, no such device, or no compiler for it.
    """
    if isinstance(model, nn.Module):
        network = model if device == "auto" else model.to(torch_device(device))
    elif isinstance(model, str) and model in shipped.index():
        network = _shipped(model, str(torch_device(device)))
    else:
        network = load(model).to(torch_device(device))
    tiling.check_dtype(network, dtype)
    if compiled:
        place = next((p.device.type for p in network.parameters()), "cpu")
        if place == "cpu" and not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl")))):
            raise UserError("--compile needs a C++ compiler on the CPU and there is none; install g++ or leave it out")
        network.compile()
    return network


def restore_tensor(
    network: nn.Module,
    image: Tensor,
    *,
    dtype: str = "float32",
    tile: int | str | None = "auto",
    overlap: int | None = None,
    padding: str = "reflect",
    ensemble: bool = False,
    progress: tiling.TileProgress | None = None,
) -> Tensor:
    """As `restore`, for a tensor and a prepared network.

    A network of another number of channels is served so: gray goes in as three equal channels and comes out as their
    mean; the colours of RGB pass through a one-channel network one by one.
    """
    channels, wanted = image.shape[1] if image.ndim == 4 else 0, needs(network).in_channels
    if channels not in (1, 3):
        raise UserError(f"restore takes (b, c, h, w) with 1 or 3 channels, got {tuple(image.shape)}")
    if not torch.isfinite(image).all():
        raise UserError("restore: the image holds values that are not numbers; replace them, say by torch.nan_to_num")
    lq = image
    if channels < wanted:
        lq = image.expand(-1, wanted, -1, -1)
    elif channels > wanted:
        lq = image.flatten(0, 1)[:, None]  # (b c) 1 h w
    first = next(network.parameters(), image)
    precision = getattr(torch, dtype)
    with torch.autocast(first.device.type, precision, enabled=precision != torch.float32):
        how: dict[str, Any] = {"tile": tile, "overlap": overlap, "padding": padding}
        out = (_eightfold if ensemble else tiling.restore)(network, lq, progress=progress, **how)
    if not torch.isfinite(out).all():
        remedy = "its weights are damaged, fetch them again" if dtype == "float32" else "use --dtype float32"
        raise UserError(f"{type(network).__name__} returned values that are not numbers in {dtype}; {remedy}")
    if channels < wanted:
        out = out.mean(1, keepdim=True)
    elif channels > wanted:
        out = out.unflatten(0, (-1, channels))[:, :, 0]  # b c h w
    return out.clamp(0, 1)


def restore_picture(
    network: nn.Module,
    picture: Picture,
    *,
    dtype: str = "float32",
    tile: int | str | None = "auto",
    overlap: int | None = None,
    padding: str = "reflect",
    ensemble: bool = False,
    progress: tiling.TileProgress | None = None,
) -> Picture:
    """As `restore`, for a decoded file and a prepared network; depth, profile and text are kept.

    Transparency is enlarged bicubically: restorers ring at its hard edges. Where it was only 0 and 1 it stays so. The
    hidden colours under it are replaced by those around it first, so that they do not bleed into the visible edge.
    """
    image = torch.from_numpy(picture.pixels).permute(2, 0, 1)[None].contiguous()  # 1 c h w
    alpha = None if picture.alpha is None else torch.from_numpy(picture.alpha)[None, None]  # 1 1 h w
    if alpha is not None and (alpha == 0).any() and (alpha > 0).any():
        image = torch.where(alpha > 0, image, _surroundings(image, (alpha > 0).to(image)))
    how: dict[str, Any] = {"tile": tile, "overlap": overlap, "padding": padding, "ensemble": ensemble, "dtype": dtype}
    out = restore_tensor(network, image, **how, progress=progress)
    if alpha is not None:
        hard = ((alpha == 0) | (alpha == 1)).all()
        alpha = F.interpolate(alpha, size=out.shape[2:], mode="bicubic", align_corners=False).clamp(0, 1)
        alpha = (alpha > 0.5).to(alpha) if hard else alpha
    pixels = out[0].permute(1, 2, 0).contiguous().numpy()
    return Picture(pixels, None if alpha is None else alpha[0, 0].numpy(), picture.bits, dict(picture.info))


def restore_video(
    network: nn.Module,
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "float32",
    tile: int | str | None = "auto",
    overlap: int | None = None,
    padding: str = "reflect",
    ensemble: bool = False,
    progress: Callable[[float, int], None] | None = None,
    note: str = "",
    force: bool = False,
) -> Changed:
    """Restore a video file frame by frame with a prepared network; times, audio and colours are kept.

    Args:
        network: prepared.
        source: the file.
        target: the file to be made; see `zoo.media.change_video`, also for the errors.
        dtype: as for `restore`.
        tile: as for `restore`.
        overlap: as for `restore`.
        padding: as for `restore`.
        ensemble: as for `restore`.
        progress: called with the frames done (parts of one count too) and in all (0 = unknown).
        note: goes into the file as its comment.
        force: replace a file that exists.
    """
    how: dict[str, Any] = {"tile": tile, "overlap": overlap, "padding": padding, "ensemble": ensemble, "dtype": dtype}
    reached = [0, 0]

    def frames(done: int, total: int) -> None:
        reached[:] = done, total

    def tiles(part: int, whole: int) -> None:
        if progress is not None:
            progress(reached[0] + part / whole, reached[1])

    def change(frame: np.ndarray) -> np.ndarray:
        return restore_picture(network, Picture(np.ascontiguousarray(frame)), **how, progress=tiles).pixels

    return change_video(source, target, change, progress=frames, note=note, force=force)


def facts(
    network: nn.Module, *, dtype: str, tile: int | str | None, padding: str = "reflect", ensemble: bool = False
) -> dict[str, str]:
    """What a result was made with, as texts for its file."""
    sha = getattr(network, "sha", None) or tensor_hash(network.state_dict())
    name = getattr(network, "variant", None) or type(network).__name__
    return {
        "Software": f"zoo {__version__}",
        "zoo:model": name,
        "zoo:weights": f"sha256 {sha}",
        "zoo:dtype": dtype,
        "zoo:tile": "off" if tile is None else str(tile),
        "zoo:padding": padding,
    } | ({"zoo:ensemble": "mean of 8 flips and turns"} if ensemble else {})


def _eightfold(
    network: nn.Module,
    lq: Tensor,
    *,
    progress: tiling.TileProgress | None,
    **how: Any,  # noqa: ANN401
) -> Tensor:
    """The mean of what becomes of all flips and turns, each undone. Source: Lim et al. 2017 (EDSR), section 3.4."""
    total = torch.zeros((), dtype=lq.dtype, device=lq.device)
    for number in range(8):
        flip, turns = number % 2, number // 2

        def told(done: int, whole: int, number: int = number) -> None:
            if progress is not None:
                progress(number * whole + done, 8 * whole)

        turned = torch.rot90(lq.flip(3) if flip else lq, turns, (2, 3)).contiguous()
        out = torch.rot90(tiling.restore(network, turned, progress=told, **how), -turns, (2, 3))
        total = total + (out.flip(3) if flip else out) / 8
    return total


def _surroundings(image: Tensor, known: Tensor) -> Tensor:
    """Fill what is not `known` with the average of what is known nearby, from coarse to fine.

    Args:
        image: (1, c, h, w).
        known: 0 or 1, (1, 1, h, w).
    """
    h, w = image.shape[2:]
    if min(h, w) < 2 and max(h, w) < 2:
        return image
    padded = (0, w % 2, 0, h % 2)
    total = F.avg_pool2d(F.pad(image * known, padded), 2)
    weight = F.avg_pool2d(F.pad(known, padded), 2)
    some = (weight > 0).to(image)
    coarse = _surroundings(total / weight.clamp(min=1e-6), some) if some.min() == 0 else total / weight
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :h, :w]
    return torch.where(known > 0, image, fine)


@lru_cache(maxsize=2)
def _shipped(name: str, device: str) -> nn.Module:
    """Shipped weights are small and never change; repeated calls of `zoo.restore` need not read them again."""
    return load(name).to(device)
