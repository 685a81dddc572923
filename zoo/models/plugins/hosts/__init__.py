"""Denoisers of diffusers that plug-ins know: which layers attend, and where the picture lies among their tokens."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import UserError

# Found by what they are made of, since names of classes change with versions: the first that fits.
_HOSTS = {
    "unet": "UNet",
    "pixart": "PixArt",
    "flux2": "Flux2",
    "flux": "Flux",
    "sd3": "SD3",
    "qwenimage": "QwenImage",
    "zimage": "ZImage",
}


@dataclass(frozen=True)
class Layout:
    """Where the picture lies in the sequence of a layer. All other tokens are text, or stand for nothing.

    Attributes:
        grid: tokens of the picture, (h, w) in raster order.
        first: place of its first token.
        texts: tokens of text of each sample where some are padding; None = all count.
    """

    grid: tuple[int, int]
    first: int = 0
    texts: tuple[int, ...] | None = None

    def of(self, tokens: int) -> "Layout":
        """That of a layer with this many tokens, which may lie some halvings further down."""
        h, w = self.grid
        while h * w > tokens > 0:
            h, w = -(-h // 2), -(-w // 2)
        return replace(self, grid=(h, w))


class Host(ABC):
    """One kind of denoiser.

    Attributes:
        title: in words.
        processors: classes of its processors, which need no arguments.
    """

    title: ClassVar[str]
    processors: ClassVar[tuple[type, ...]]

    @staticmethod
    @abstractmethod
    def fits(denoiser: nn.Module) -> bool:
        """Whether the denoiser is made of what this host needs."""

    @abstractmethod
    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The layers in which tokens of the picture attend to each other, by name, in the order of the network."""

    @abstractmethod
    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """Where the picture lies, from the arguments of the denoiser's forward."""

    def processor(self, attention: nn.Module) -> object:
        """A new processor for one layer."""
        return self.processors[0]()

    def fuse_again(self, layers: Mapping[str, Any]) -> None:
        """Bring fused projections up to date with what was loaded into their parts."""
        for attention in layers.values():
            if getattr(attention, "fused_projections", False):
                for kind in ("weight", "bias"):
                    whole = getattr(attention.to_qkv, kind)
                    if whole is not None:
                        parts = [getattr(base(part), kind) for part in (attention.to_q, attention.to_k, attention.to_v)]
                        with torch.no_grad():
                            whole.copy_(torch.cat(parts))


def base(layer: Any) -> Any:  # noqa: ANN401
    """The layer below the adapters that PEFT wraps around it."""
    return getattr(layer, "base_layer", layer)


def has_parts(denoiser: nn.Module, *names: str) -> bool:
    """Whether all are children of the denoiser."""
    return set(names) <= {name for name, _ in denoiser.named_children()}


def self_attention(denoiser: nn.Module) -> dict[str, Any]:
    """The first attention of blocks that have a second one for text."""
    layers = attention_layers(denoiser)
    return {name: layer for name, layer in layers.items() if name.endswith(".attn1") and not layer.is_cross_attention}


def attention_layers(denoiser: nn.Module) -> dict[str, Any]:
    """All layers that take processors, by name."""
    return {name: module for name, module in denoiser.named_modules() if hasattr(module, "set_processor")}


def grid_of(ids: Tensor) -> tuple[int, int]:
    """The grid of the first picture among tokens whose places, (n, 3) or (b, n, 3), are (picture, y, x).

    Raises:
        UserError: they are not a grid in raster order.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    first = ids[: int((ids[:, 0] == ids[0, 0]).sum())]
    h, w = (int(n) + 1 for n in (first[-1] - first[0])[1:3])
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    if len(first) != h * w or not torch.equal(
        (first - first[0])[:, 1:3].cpu().long(), torch.stack([y.flatten(), x.flatten()], 1)
    ):
        raise UserError(
            f"img_ids must hold the rows and columns of a grid, one row after the other, got {len(ids)} tokens"
        )
    return h, w


def find_host(denoiser: nn.Module) -> Host:
    """The host that fits.

    Raises:
        UserError: none does.
    """
    for module, name in _HOSTS.items():
        host = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        if host.fits(denoiser):
            return host()
    raise UserError(
        f"zoo.apply knows no {type(denoiser).__name__}; it knows the UNets of Stable Diffusion, SD 3, Flux, "
        "Flux2, PixArt, Qwen-Image and Z-Image"
    )
