"""Z-Image: picture and text in one sequence, the picture first; each is filled up to a multiple of 32 tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.models.plugins.hosts import Host, Layout, has_parts

_MULTIPLE = 32  # of tokens, with learnt ones that attend and are attended to


class ZImageProcessor:
    """Attention as diffusers' ZSingleStreamAttnProcessor computes it, but for its two steps."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,  # noqa: ANN401
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """Tokens of picture and text, (b, n, c)."""
        projected = attn.plugin.project(attn, hidden_states, hidden_states)
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in projected)  # b n heads d
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if freqs_cis is not None:
            q, k = (_turned(t, freqs_cis) for t in (q, k))
        out = attn.plugin.attend(attn, *(t.transpose(1, 2) for t in (q, k, v)))  # b heads n d
        out = out.transpose(1, 2).flatten(2).to(hidden_states.dtype)
        for layer in attn.to_out:
            out = layer(out)
        return out


class ZImage(Host):
    """ZImageTransformer2DModel of diffusers; text alone is refined as it was."""

    title = "Z-Image"
    processors = (ZImageProcessor,)

    @staticmethod
    def fits(denoiser: nn.Module) -> bool:
        """One chain of layers, and refiners for noise and for text."""
        return has_parts(denoiser, "layers", "noise_refiner", "context_refiner")

    def layers(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The attention of the refiner of noise and of all layers."""
        chosen = ("noise_refiner.", "layers.")
        named = denoiser.named_modules()
        return {name: module for name, module in named if hasattr(module, "set_processor") and name.startswith(chosen)}

    def layout(self, denoiser: Any, given: Mapping[str, Any]) -> Layout:  # noqa: ANN401
        """Patches of the latents, then the tokens that fill them up, then the text.

        Raises:
            UserError: pictures to be edited, several frames, or pictures of several sizes.
        """
        pictures, texts = given["x"], given["cap_feats"]
        if any(isinstance(picture, list) for picture in pictures):
            raise UserError("plug-ins on Z-Image make pictures from text; pictures to be edited are not supported")
        sizes = {tuple(picture.shape[1:]) for picture in pictures}
        if len(sizes) > 1 or next(iter(sizes))[0] != given.get("f_patch_size", 1):
            raise UserError(f"plug-ins on Z-Image need pictures of one size and one frame, got {sorted(sizes)}")
        h, w = (side // given.get("patch_size", 2) for side in next(iter(sizes))[1:])
        lengths = tuple(-(h * w) % _MULTIPLE + len(text) + -len(text) % _MULTIPLE for text in texts)
        return Layout((h, w), 0, lengths if len(set(lengths)) > 1 else None)


def _turned(t: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotary embedding of (b, n, heads, d) by complex (b, n, d / 2), in float32."""
    with torch.amp.autocast(t.device.type, enabled=False):
        pairs = torch.view_as_complex(t.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis[:, :, None]).flatten(3).type_as(t)
