"""Qwen-Image: text and picture in one sequence, text first and padded, rotated apart."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch import Tensor, nn

from zoo.models.plugins.hosts import Host, Layout, attention_layers, has_parts


class QwenImageProcessor:
    """Joint attention as diffusers' QwenDoubleStreamAttnProcessor2_0 computes it, but for its two steps."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the picture and of the text, (b, n, c) each."""
        if attention_mask is not None:
            raise ValueError(f"{attn.plugin.title}: attention_mask must be None, got one of {attention_mask.shape}")
        parts = (getattr(attn, f"add_{name}_proj")(encoder_hidden_states) for name in "qkv")
        picture = _heads(attn, attn.plugin.project(attn, hidden_states, hidden_states), attn.norm_q, attn.norm_k)
        text = _heads(attn, tuple(parts), attn.norm_added_q, attn.norm_added_k)
        if image_rotary_emb is not None:
            picture, text = (
                (*(apply_rotary_emb_qwen(t, turns, use_real=False) for t in own[:2]), own[2])
                for own, turns in zip((picture, text), image_rotary_emb, strict=True)
            )
        q, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(text, picture, strict=True))  # b heads n d
        out = attn.plugin.attend(attn, q, k, v)
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        said, seen = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        for layer in attn.to_out:
            seen = layer(seen)
        return seen, attn.to_add_out(said)


class QwenImage(Host):
    """QwenImageTransformer2DModel of diffusers."""

    title = "Qwen-Image"
    processors = (QwenImageProcessor,)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """Joint blocks, and one linear layer each for the picture and for normed text."""
        return has_parts(denoiser, "transformer_blocks", "img_in", "txt_in", "txt_norm", "pos_embed")

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The attention of all blocks."""
        return attention_layers(denoiser)

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """The first of img_shapes, behind the text; pictures to be edited count as text."""
        first = given["img_shapes"][0]
        _, h, w = first[0] if isinstance(first, list) else first
        mask = given.get("encoder_hidden_states_mask")
        texts = None if mask is None or bool(mask.all()) else tuple(int(n) for n in mask.sum(1))
        return Layout((h, w), given["encoder_hidden_states"].shape[1], texts)


def _heads(attn: Any, projected: tuple[Tensor, ...], norm_q: Any, norm_k: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in projected)  # b n heads d
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v
