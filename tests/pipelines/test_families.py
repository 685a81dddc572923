"""Training calls a denoiser as its own pipeline does."""

from functools import partial

import pytest
import torch

from tests.helpers import error
from tests.pipelines import tiny
from zoo.errors import UserError
from zoo.pipelines.families import FAMILIES, family

PROMPTS = ["a red circle", "a large blue star above a ring"]
IMAGE, VIDEO = (2, 4, 8, 8), (2, 4, 2, 4, 4)
CASES = {
    "StableDiffusionPipeline": (tiny.stable_diffusion, IMAGE, {"height": 32, "width": 32}),
    "PixArtAlphaPipeline": (
        tiny.pixart,
        IMAGE,
        {"height": 32, "width": 32, "use_resolution_binning": False, "clean_caption": False},
    ),
    "StableDiffusion3Pipeline": (tiny.stable_diffusion_3, IMAGE, {"height": 32, "width": 32}),
    "FluxPipeline": (tiny.flux, IMAGE, {"height": 32, "width": 32}),
    "WanPipeline": (tiny.wan, VIDEO, {"height": 32, "width": 32, "num_frames": 5}),
    "CogVideoXPipeline": (
        tiny.cogvideox,
        VIDEO,
        {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16},
    ),
    "CogVideoXPipeline, rotary": (
        partial(tiny.cogvideox, use_rotary_positional_embeddings=True, attention_head_dim=16),
        (2, 4, 2, 4, 8),
        {"height": 32, "width": 64, "num_frames": 5, "max_sequence_length": 16},
    ),
}


class Stop(Exception):
    """The pipeline has called its denoiser; the rest is not needed."""


@pytest.fixture(scope="module", params=CASES)
def case(request):
    build, shape, keywords = CASES[request.param]
    return family(request.param.partition(",")[0]), build(), shape, keywords


def first_call(pipe, denoiser, latents, keywords):
    """Timestep and output of the first call that the pipeline makes."""
    seen = {}

    def spy(module, args, kwargs, output):
        seen.update(zip(("sample", "timestep"), args, strict=False))
        seen.update(kwargs, output=output[0])
        raise Stop

    handle = denoiser.register_forward_hook(spy, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe(PROMPTS, latents=latents, guidance_scale=1.0, num_inference_steps=2, output_type="latent", **keywords)
    except Stop:
        pass
    finally:
        handle.remove()
    return seen


@torch.no_grad()
def test_a_denoiser_is_called_as_its_pipeline_calls_it(case):
    row, pipe, shape, keywords = case
    denoiser = getattr(pipe, row.denoiser).eval()
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    name, given = type(pipe).__name__, latents
    if name == "FluxPipeline":
        given = pipe._pack_latents(latents, 2, 4, 8, 8)
    elif name == "CogVideoXPipeline":
        given = latents.transpose(1, 2)
    seen = first_call(pipe, denoiser, given, keywords)
    timestep = seen["timestep"] * (1000 if name == "FluxPipeline" else 1)
    timestep = timestep.expand(len(latents)) if timestep.ndim == 0 else timestep
    context = row.encode(pipe, PROMPTS)
    ours = row.predict(denoiser, latents, timestep, context)
    assert ours.shape == latents.shape
    theirs = seen["output"]
    if name == "FluxPipeline":
        theirs = pipe._unpack_latents(theirs, 32, 32, pipe.vae_scale_factor)
    elif name == "CogVideoXPipeline":
        theirs = theirs.transpose(1, 2)
    assert error(ours, theirs[:, : ours.shape[1]]) < 1e-5


def test_gradients_reach_the_denoiser(case):
    row, pipe, shape, _ = case
    denoiser = getattr(pipe, row.denoiser)
    with torch.no_grad():
        context = row.encode(pipe, PROMPTS)
    row.predict(denoiser, torch.randn(shape), torch.tensor([10.0, 900.0]), context).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in denoiser.parameters())


def test_the_text_decides(case):
    row, pipe, *_ = case
    first, second = (row.encode(pipe, [prompt]) for prompt in PROMPTS)
    assert not torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])


def test_an_unknown_pipeline_is_refused():
    assert {name.partition(",")[0] for name in CASES} <= set(FAMILIES)
    with pytest.raises(UserError, match="Did you mean 'FluxPipeline'"):
        family("FluxPipelin")
