"""How the denoisers of diffusers are called in training: one row per pipeline class.

A pipeline knows how to encode prompts but hides the call of its denoiser in a loop. A row says which part is the
denoiser, what of `encode_prompt` conditions it, and how latents of one layout, `b c h w` or `b c t h w`, go in and come
out, whatever layout the denoiser itself takes.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError, nearest

Context = dict[str, Tensor]  # keywords of a denoiser


@dataclass(frozen=True)
class Family:
    """A row.

    Attributes:
        denoiser: name of the pipeline's part that is trained.
        encode: (pipeline, prompts) -> what conditions the denoiser.
        predict: (denoiser, latents, timestep, context) -> prediction in the layout of the latents.
        clips: whether it makes these instead of pictures.
    """

    denoiser: str
    encode: Callable[[Any, list[str]], Context]
    predict: Callable[[nn.Module, Tensor, Tensor, Context], Tensor]
    clips: bool = False


def family(pipeline: str) -> Family:
    """The row of a pipeline class.

    Raises:
        UserError: training it is not supported.
    """
    if pipeline not in FAMILIES:
        raise UserError(f"pipeline {pipeline!r} cannot be trained.{nearest(pipeline, FAMILIES)} Known: {_known()}.")
    return FAMILIES[pipeline]


def _known() -> str:
    return ", ".join(FAMILIES)


def _encoded(pipe: Any, prompts: Sequence[str], **keywords: Any) -> tuple[Any, ...]:  # noqa: ANN401
    """`encode_prompt` without guidance, with what this pipeline's version of it takes of the keywords."""
    device = next(pipe.text_encoder.parameters()).device
    wanted = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    length = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    if length is not None:  # Wan's encode_prompt has another default than its sampling
        wanted["max_sequence_length"] = length.default
    wanted |= keywords
    known = inspect.signature(pipe.encode_prompt).parameters
    return pipe.encode_prompt(list(prompts), **{key: value for key, value in wanted.items() if key in known})


def _hidden(pipe: Any, prompts: list[str]) -> Context:  # noqa: ANN401
    return {"encoder_hidden_states": _encoded(pipe, prompts)[0]}


def _masked(pipe: Any, prompts: list[str]) -> Context:  # noqa: ANN401
    hidden, mask, *_ = _encoded(pipe, prompts)
    return {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}


def _pooled(pipe: Any, prompts: list[str]) -> Context:  # noqa: ANN401
    hidden, _, pooled, _ = _encoded(pipe, prompts, prompt_2=None, prompt_3=None)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def _cogvideox(pipe: Any, prompts: list[str]) -> Context:  # noqa: ANN401
    length = pipe.transformer.config.max_text_seq_length
    return {"encoder_hidden_states": _encoded(pipe, prompts, max_sequence_length=length)[0]}


def _flux(pipe: Any, prompts: list[str]) -> Context:  # noqa: ANN401
    hidden, pooled, places = _encoded(pipe, prompts, prompt_2=None)
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled, "txt_ids": places}


def _plain(denoiser: nn.Module, latents: Tensor, timestep: Tensor, context: Mapping[str, Tensor]) -> Tensor:
    return denoiser(latents, timestep=timestep, **context, return_dict=False)[0]


def _pixart(denoiser: nn.Module, latents: Tensor, timestep: Tensor, context: Mapping[str, Tensor]) -> Tensor:
    sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if denoiser.config.sample_size == 128:  # pyright: ignore (its largest model is told the picture's size)
        h, w = (8.0 * n for n in latents.shape[2:])
        sizes = {"resolution": latents.new_tensor([[h, w]]), "aspect_ratio": latents.new_tensor([[h / w]])}
        sizes = {name: value.repeat(len(latents), 1) for name, value in sizes.items() if value is not None}
    out = denoiser(latents, timestep=timestep, **context, added_cond_kwargs=sizes, return_dict=False)[0]
    return out[:, : latents.shape[1]]  # the second half, a variance, is not trained


def _packed(denoiser: nn.Module, latents: Tensor, timestep: Tensor, context: Mapping[str, Tensor]) -> Tensor:
    """Flux: 2x2 latents are one token, time runs from 0 to 1, and guidance is an input."""
    b, _, h, w = latents.shape
    tokens = latents.unflatten(3, (w // 2, 2)).unflatten(2, (h // 2, 2))  # b c h/2 2 w/2 2
    tokens = tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # b (h/2 w/2) (c 2 2)
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=2).flatten(0, 1).to(latents)  # n 3
    config = denoiser.config  # pyright: ignore
    guidance = latents.new_ones(b) if config.guidance_embeds else None  # pyright: ignore
    out = denoiser(tokens, timestep=timestep / 1000, **context, img_ids=places, guidance=guidance, return_dict=False)[0]
    out = out.unflatten(2, (-1, 2, 2)).unflatten(1, (h // 2, w // 2))  # b h/2 w/2 c 2 2
    return out.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # b c h w


def _frames_first(denoiser: nn.Module, latents: Tensor, timestep: Tensor, context: Mapping[str, Tensor]) -> Tensor:
    """CogVideoX: b t c h w, and rotary positions in all but its smallest model."""
    places: dict[str, Any] = {}
    if denoiser.config.use_rotary_positional_embeddings:  # pyright: ignore
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline

        *_, t, h, w = latents.shape
        like = SimpleNamespace(transformer=denoiser, vae_scale_factor_spatial=1)  # sizes in latents, not in pixels
        rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(like, h, w, t, latents.device)  # pyright: ignore
        places["image_rotary_emb"] = rotary
    return _plain(denoiser, latents.transpose(1, 2), timestep, {**context, **places}).transpose(1, 2)


FAMILIES = {
    "StableDiffusionPipeline": Family("unet", _hidden, _plain),
    "PixArtAlphaPipeline": Family("transformer", _masked, _pixart),
    "PixArtSigmaPipeline": Family("transformer", _masked, _pixart),
    "StableDiffusion3Pipeline": Family("transformer", _pooled, _plain),
    "FluxPipeline": Family("transformer", _flux, _packed),
    "WanPipeline": Family("transformer", _hidden, _plain, clips=True),
    "CogVideoXPipeline": Family("transformer", _cogvideox, _frames_first, clips=True),
}
