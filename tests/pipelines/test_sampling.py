"""Prompts to pictures: the same as plain diffusers, each its own, refused in one sentence."""

import diffusers
import numpy as np
import pytest
import torch

from tests.pipelines.tiny import stable_diffusion
from zoo.errors import UserError
from zoo.pipelines.parts import read_settings, save_pipeline
from zoo.pipelines.sampling import Sampler, Settings

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipeline")
    stable_diffusion().save_pretrained(place)
    return place


def make(folder, *prompts, num=1, **settings):
    return list(Sampler(str(folder), Settings(**{"steps": 3, **settings})).sample(list(prompts or [PROMPT]), num))


def test_a_picture_is_that_of_plain_diffusers(folder):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    plain = pipe(
        PROMPT,
        num_inference_steps=3,
        guidance_scale=5.0,
        height=48,
        width=64,
        negative_prompt="a star",
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images[0]
    (made,) = make(folder, guidance=5.0, size=(64, 48), negative="a star", seed=7)
    assert made.pixels.shape == (48, 64, 3)
    assert np.array_equal(made.pixels, plain)


def test_a_picture_does_not_depend_on_those_made_with_it(folder):
    together = make(folder, PROMPT, "a blue star", num=3, seed=4)
    assert [(m.prompt, m.seed) for m in together] == [(p, s) for p in (PROMPT, "a blue star") for s in (4, 5, 6)]
    (alone,) = make(folder, "a blue star", seed=6)
    assert np.array_equal(alone.pixels, together[5].pixels)
    assert not np.array_equal(together[0].pixels, together[1].pixels)


def test_another_scheduler_keeps_the_settings_of_the_present_one(folder):
    sampler = Sampler(str(folder), Settings(scheduler="DPMSolverMultistep"))
    assert type(sampler.pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert sampler.pipe.scheduler.config.prediction_type == "v_prediction"


def test_progress_counts_all_steps(folder):
    seen = []
    sampler = Sampler(str(folder), Settings(steps=2))
    list(sampler.sample([PROMPT], 3, step=lambda done, total, prompt: seen.append((done, total))))
    assert seen == [(n, 6) for n in range(1, 7)]


def test_facts_tell_how_to_make_it_again(folder):
    sampler = Sampler(str(folder), Settings(steps=2, guidance=3.5, seed=11))
    (made,) = sampler.sample([PROMPT])
    facts = sampler.facts(made)
    assert facts["zoo:prompt"] == PROMPT
    assert (facts["zoo:seed"], facts["zoo:steps"], facts["zoo:guidance"]) == ("11", "2", "3.5")
    assert facts["zoo:scheduler"] == "DDIMScheduler"
    assert len(sampler.weights) == 64
    other = stable_diffusion()
    with torch.no_grad():
        next(other.unet.parameters()).add_(1e-3)
    assert Sampler(other).weights != sampler.weights


def test_defaults_are_those_of_the_pipeline(folder):
    sampler = Sampler(str(folder))
    assert (sampler.steps, sampler.guidance) == (50, 7.5)


def test_a_trained_pipeline_knows_what_it_should_be_sampled_with(tmp_path):
    save_pipeline(stable_diffusion(), tmp_path, 7, 3.0)
    assert read_settings(str(tmp_path)) == {"steps": 7, "guidance": 3.0}
    sampler = Sampler(str(tmp_path))
    assert (sampler.steps, sampler.guidance) == (7, 3.0)
    sampler = Sampler(str(tmp_path), Settings(steps=2, guidance=1.0))
    assert (sampler.steps, sampler.guidance) == (2, 1.0)
    assert read_settings("stabilityai/sd-turbo") == {}


def test_advice_on_what_the_pipeline_cannot_heed(folder):
    sampler = Sampler(str(folder))
    assert sampler.advice(PROMPT) == []
    (sentence,) = sampler.advice("red " * 10000)
    assert "10002 tokens and only the first 24 count" in sentence
    with pytest.raises(UserError, match="the prompt is empty"):
        sampler.advice("  ")
    assert "does not know 'zebra', '😀'" in sampler.advice("a red zebra 😀")[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"size": (0, 64)}, "size must be at least 8 pixels"),
        ({"size": (65, 65)}, "divisible by 8"),
        ({"scheduler": "Eulr"}, "scheduler 'Eulr' is unknown"),
        ({"scheduler": "FlowMatchEulerDiscrete"}, "does not suit this pipeline's DDIMScheduler"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(folder, settings, said):
    with pytest.raises(UserError) as caught:
        make(folder, **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipeline_without_prompts_is_refused():
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(4, 4, 4, 4), norm_num_groups=2)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    with pytest.raises(UserError, match="takes no prompt"):
        Sampler(pipe)
