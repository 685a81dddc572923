"""UNets of Stable Diffusion 1.5, 2.1 and XL: self-attention without text, at several resolutions."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from zoo.models.plugins.hosts import Host, Layout, has_parts, self_attention


class UNetProcessor:
    """Self-attention as diffusers' AttnProcessor2_0 computes it in blocks of transformers, but for its two steps."""

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Tokens, (b, n, c), attend to each other, or to those of a context."""
        if attention_mask is not None:
            raise ValueError(f"{attn.plugin.title}: attention_mask must be None, got one of {attention_mask.shape}")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.plugin.project(attn, hidden_states, context)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in projected)  # b heads n d
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = attn.plugin.attend(attn, q, k, v)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)  # b n c
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class UNet(Host):
    """UNet2DConditionModel of diffusers and what is made like it."""

    title = "a UNet"
    processors = (UNetProcessor,)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """It has a way down and a way up, and transformers in them."""
        return has_parts(denoiser, "down_blocks", "up_blocks", "mid_block") and bool(self_attention(denoiser))

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """All attn1, down, up, middle."""
        return self_attention(denoiser)

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """The grid of the latents; layers further down have halves of it."""
        h, w = given["sample"].shape[-2:]
        return Layout((h, w))
