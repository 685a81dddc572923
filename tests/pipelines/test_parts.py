"""Pipelines from plain data: built, saved, opened again, refused."""

import diffusers
import pytest
import torch

from tests.pipelines.tiny import PARTS, VAE, stable_diffusion
from zoo.errors import UserError
from zoo.pipelines.parts import assemble, build_parts, locate, open_pipeline, to_latents, to_pixels


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    stable_diffusion().save_pretrained(folder)
    return folder


def test_a_saved_pipeline_opens_in_zoo_and_in_plain_diffusers(saved):
    ours, plain = open_pipeline(str(saved)), diffusers.StableDiffusionPipeline.from_pretrained(saved)
    for name in ("unet", "vae", "text_encoder"):
        for a, b in zip(getattr(ours, name).parameters(), getattr(plain, name).parameters(), strict=True):
            assert torch.equal(a, b)
    assert ours.scheduler.config.prediction_type == "v_prediction"


def test_a_run_folder_means_its_pipeline(saved):
    assert locate(str(saved.parent)) == str(saved)
    assert type(open_pipeline(str(saved.parent))).__name__ == "StableDiffusionPipeline"


def test_a_part_comes_from_a_folder(saved):
    for place in (saved, saved / "vae"):
        vae = build_parts({"vae": str(place)})["vae"]
        assert vae.config.latent_channels == 4
    parts = build_parts({name: str(saved) for name in ("tokenizer", "text_encoder", "scheduler", "unet")})
    assert parts["tokenizer"]("red").input_ids == stable_diffusion().tokenizer("red").input_ids


def test_a_part_from_a_folder_is_real_also_while_the_rest_is_sketched(saved):
    with torch.device("meta"):
        pipe = assemble("StableDiffusionPipeline", {**PARTS, "vae": str(saved / "vae")})
    assert next(pipe.unet.parameters()).is_meta
    assert not next(pipe.vae.parameters()).is_meta


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"unett": VAE}, "has no part 'unett'. Did you mean 'unet'"),
        ({"vae": {"latent_channels": 4}}, "needs a class_name"),
        ({"vae": {"class_name": "AutoencoderKK"}}, "no class 'AutoencoderKK'. Did you mean 'AutoencoderKL'"),
        ({"vae": {"class_name": "AutoencoderKL", "chanels": 4}}, "AutoencoderKL takes no 'chanels'"),
        ({"vae": {**VAE, "norm_num_groups": 3}}, "part 'vae': num_channels (4) must be divisible"),
        ({"vae": "no/such/folder"}, "no/such/folder is no folder"),
        ({"text_encoder": {"class_name": "CLIPTextModel"}}, "needs its tokenizer"),
        ({"tokenizer": {"class_name": "CLIPTokenizer", "words": "english"}}, "words must be shapes"),
        ({"vae": {"class_name": "os.system"}}, "no class 'os.system'"),
        ({"vae": {"class_name": "load_image"}}, "no class 'load_image'"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_in_one_sentence(parts, said):
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        assemble("StableDiffusionPipeline", parts)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_pipeline_and_a_hub_id_without_network(tmp_path):
    with pytest.raises(UserError, match=r"no model_index\.json"):
        open_pipeline(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="neither a folder here nor to be had from the hub"):
        open_pipeline("someone/nothing")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be opened"):
        open_pipeline(str(tmp_path))


def test_latents_are_scaled_as_pipelines_expect_them():
    vae = build_parts({"vae": {**VAE, "scaling_factor": 2.0, "shift_factor": 0.5}})["vae"]
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        plain = vae.encode(image * 2 - 1).latent_dist.mode()
        assert torch.allclose(to_latents(vae, image), (plain - 0.5) * 2)
        there_and_back = to_pixels(vae, to_latents(vae, image))
        assert torch.allclose(there_and_back, vae.decode(plain).sample / 2 + 0.5, atol=1e-5)
