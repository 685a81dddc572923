"""FLUX.1: text and picture in one sequence, text first, in double and in single blocks."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from zoo.models.plugins.hosts import Host, Layout, attention_layers, grid_of, has_parts


class FluxProcessor:
    """Joint attention as diffusers' FluxAttnProcessor computes it, but for its two steps."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens, (b, n, c), of a single block, or those of the picture and of the text of a double block."""
        if attention_mask is not None:
            raise ValueError(f"{attn.plugin.title}: attention_mask must be None, got one of {attention_mask.shape}")
        projected = attn.plugin.project(attn, hidden_states, hidden_states)
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in projected)  # b n heads d
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            texts = self._text(attn, encoder_hidden_states)
            tq, tk, tv = (t.unflatten(-1, (-1, attn.head_dim)) for t in texts)
            q = torch.cat([attn.norm_added_q(tq), q], 1)
            k = torch.cat([attn.norm_added_k(tk), k], 1)
            v = torch.cat([tv, v], 1)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        out = attn.plugin.attend(attn, *(t.transpose(1, 2) for t in (q, k, v)))  # b heads n d
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        if encoder_hidden_states is None:
            return out
        text, picture = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(text)

    @staticmethod
    def _text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        if attn.fused_projections:
            return attn.to_added_qkv(text).chunk(3, dim=-1)
        return attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)


class Flux(Host):
    """FluxTransformer2DModel of diffusers and what is made like it."""

    title = "Flux"
    processors = (FluxProcessor,)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """It has double and single blocks (and is no Flux2, which is asked first)."""
        return has_parts(denoiser, "transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder")

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The attention of all blocks, double ones first."""
        return attention_layers(denoiser)

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """The grid that img_ids span, behind the text."""
        return Layout(grid_of(given["img_ids"]), given["encoder_hidden_states"].shape[1])
