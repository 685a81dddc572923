"""FLUX.2: as FLUX.1, but single blocks project queries, keys, values and the feed-forward part at once."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.models.plugins.hosts import Host, Layout, attention_layers, grid_of, has_parts
from zoo.models.plugins.hosts.flux import FluxProcessor


class Flux2SingleProcessor:
    """A single block as diffusers' Flux2ParallelSelfAttnProcessor computes it, but for the attention."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Tokens of text and picture, (b, n, c)."""
        if attention_mask is not None:
            raise ValueError(f"{attn.plugin.title}: attention_mask must be None, got one of {attention_mask.shape}")
        widths = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]
        projected, forward = attn.to_qkv_mlp_proj(hidden_states).split(widths, -1)
        q, k, v = (t.unflatten(-1, (-1, attn.head_dim)) for t in projected.chunk(3, -1))  # b n heads d
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(t, image_rotary_emb, sequence_dim=1) for t in (q, k))
        out = attn.plugin.attend(attn, *(t.transpose(1, 2) for t in (q, k, v)))  # b heads n d
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(forward)], -1))


class Flux2(Host):
    """Flux2Transformer2DModel of diffusers, dev and klein."""

    title = "Flux2"
    processors = (FluxProcessor, Flux2SingleProcessor)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """Double blocks, and single ones with one projection for all."""
        parts = ("transformer_blocks", "single_transformer_blocks", "x_embedder", "context_embedder")
        return has_parts(denoiser, *parts) and any(map(_is_single, attention_layers(denoiser).values()))

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The attention of all blocks, double ones first."""
        return attention_layers(denoiser)

    def processor(self, attention: nn.Module) -> object:
        """One of two kinds."""
        return Flux2SingleProcessor() if _is_single(attention) else FluxProcessor()

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """The grid of the first picture of img_ids, behind the text; pictures to be edited count as text.

        Raises:
            UserError: keys of such pictures are cached.
        """
        if given.get("kv_cache") is not None:
            raise UserError("plug-ins need the pictures to be edited in every step; call the pipeline without kv_cache")
        return Layout(grid_of(given["img_ids"]), given["encoder_hidden_states"].shape[1])


def _is_single(attention: nn.Module) -> bool:
    return hasattr(attention, "to_qkv_mlp_proj")
