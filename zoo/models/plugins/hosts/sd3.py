"""Stable Diffusion 3: picture and text in one sequence, the picture first; some blocks attend within it as well."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.models.plugins.hosts import Host, Layout, attention_layers, has_parts


class SD3Processor:
    """Joint attention as diffusers' JointAttnProcessor2_0 computes it, but for its two steps."""

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens of the picture, (b, n, c), and those of the text where they attend too."""
        if attention_mask is not None:
            raise ValueError(f"{attn.plugin.title}: attention_mask must be None, got one of {attention_mask.shape}")
        q, k, v = _heads(attn, attn.plugin.project(attn, hidden_states, hidden_states), attn.norm_q, attn.norm_k)
        if encoder_hidden_states is not None:
            parts = (getattr(attn, f"add_{name}_proj")(encoder_hidden_states) for name in "qkv")
            texts = _heads(attn, tuple(parts), attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, 2) for pair in zip((q, k, v), texts, strict=True))
        out = attn.plugin.attend(attn, q, k, v)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)  # b n c
        picture = attn.to_out[1](attn.to_out[0](out[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return picture
        text = out[:, hidden_states.shape[1] :]
        return picture, text if attn.context_pre_only else attn.to_add_out(text)


class SD3(Host):
    """SD3Transformer2DModel of diffusers, 3 and 3.5."""

    title = "Stable Diffusion 3"
    processors = (SD3Processor,)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """Joint blocks only, and a way from pooled text to the time embedding."""
        parts = ("transformer_blocks", "time_text_embed", "context_embedder", "pos_embed")
        return has_parts(denoiser, *parts) and not hasattr(denoiser, "single_transformer_blocks")

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """Attn of all blocks and attn2 where there is one."""
        return attention_layers(denoiser)

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """Patches of the latents, before the text."""
        h, w = (side // denoiser.config.patch_size for side in given["hidden_states"].shape[-2:])
        return Layout((h, w))


def _heads(attn: Any, projected: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in projected)  # b heads n d
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
