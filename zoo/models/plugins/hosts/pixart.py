"""PixArt: self-attention of the picture alone; text comes in by cross-attention."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from zoo.models.plugins.hosts import Host, Layout, has_parts, self_attention
from zoo.models.plugins.hosts.unet import UNetProcessor


class PixArt(Host):
    """PixArtTransformer2DModel of diffusers, alpha and sigma."""

    title = "PixArt"
    processors = (UNetProcessor,)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """One chain of blocks with self- and cross-attention, modulated by one table."""
        return has_parts(denoiser, "transformer_blocks", "adaln_single") and bool(self_attention(denoiser))

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """attn1 of all blocks."""
        return self_attention(denoiser)

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """Patches of the latents."""
        h, w = (side // denoiser.config.patch_size for side in given["hidden_states"].shape[-2:])
        return Layout((h, w))
