"""Denoisers: the right target for every prediction, the same noise everywhere, a pipeline that diffusers loads."""

import os
import signal

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import error
from tests.pipelines import tiny as pipelines
from tests.pipelines.tiny import DDIM, FLOW
from tests.tasks.test_resume import At
from tests.tasks.tiny import in_child, make_run, make_trainer, quiet
from tests.tasks.tiny_generation import ADAMW, make_diffusion, make_shapes
from zoo import tracking
from zoo.errors import UserError
from zoo.pipelines.parts import to_latents
from zoo.tasks.diffusion import DiffusionTask
from zoo.tasks.ema import EMA
from zoo.tasks.previews import Previews
from zoo.tasks.run import Run

PREDICTIONS = {
    "epsilon": {**DDIM, "prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "v_prediction": DDIM,
    "sample": {**DDIM, "prediction_type": "sample"},
    "flow": FLOW,
}


class Oracle(torch.nn.Module):
    """A denoiser that knows the clean latents and the noise, and answers as a scheduler would have it."""

    def __init__(self, latents, noise, scheduler):
        super().__init__()
        self.latents, self.noise, self.scheduler, self.seen = latents, noise, scheduler, None
        self.off = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy, timestep, encoder_hidden_states, return_dict):
        self.seen = noisy, timestep
        if isinstance(self.scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
            answer = self.noise - self.latents
        elif self.scheduler.config.prediction_type == "v_prediction":
            answer = self.scheduler.get_velocity(self.latents, self.noise, timestep)
        else:
            answer = {"epsilon": self.noise, "sample": self.latents}[self.scheduler.config.prediction_type]
        return (answer + self.off,)


@pytest.fixture(scope="module")
def batch():
    return next(iter(make_shapes().train_dataloader()))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_what_the_scheduler_of_diffusers_takes_back(prediction, batch):
    task = make_diffusion(PREDICTIONS[prediction], drop_caption=0.0)
    latents = to_latents(task.pipe.vae, batch["image"]).detach()
    noise = torch.stack([task.noising.draw(int(number), latents.shape[1:])[0] for number in batch["number"]])
    oracle = Oracle(latents, noise, task.pipe.scheduler)
    task.pipe.unet = oracle
    assert task._loss(batch, 0.0).max() < 1e-10
    noisy, timestep = oracle.seen
    if prediction == "flow":
        sigma = (timestep / 1000).view(-1, 1, 1, 1)
        assert error(noisy, (1 - sigma) * latents + sigma * noise) < 1e-6
    else:
        assert error(noisy, task.pipe.scheduler.add_noise(latents, noise, timestep)) < 1e-5


def test_noise_and_timestep_are_functions_of_the_sample_alone(batch):
    task = make_diffusion(drop_caption=0.0).eval()
    with torch.no_grad():
        together = task._loss(batch, 0.0)
        apart = [task._loss({k: v[i : i + 1] for k, v in batch.items()}, 0.0) for i in (1, 0)]
    assert error(torch.cat(apart[::-1]), together) < 1e-5
    assert make_diffusion(seed=1).noising.seed == 1


def test_a_dropped_caption_is_the_empty_one(batch):
    task = make_diffusion().eval()
    with torch.no_grad():
        dropped, empty = task._loss(batch, 1.0), task._loss({**batch, "caption": ["", ""]}, 0.0)
    assert torch.equal(dropped, empty)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    quiet()
    run = make_run(tmp_path_factory.mktemp("diffusion"))
    task = make_diffusion(adherence=2, prompts=["a red circle", "a blue star"])
    trainer = make_trainer(run, [EMA([0.5]), Previews(every=4, count=2)], max_steps=8)
    trainer.fit(task, datamodule=make_shapes())
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    return run, task, rows


def test_the_written_pipeline_is_the_averaged_one_and_loads_in_plain_diffusers(trained):
    run, task, _ = trained
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(run.folder / "pipeline")
    average = next(c for c in task.trainer.callbacks if isinstance(c, EMA)).average()
    for name, weight in pipe.unet.named_parameters():
        assert torch.equal(weight, average[f"trained.unet.{name}"])
    generators = [torch.Generator().manual_seed(n) for n in (1, 2)]
    out = pipe(["a red circle"] * 2, generator=generators, num_inference_steps=2, guidance_scale=4.0, output_type="np")
    assert out.images.shape == (2, 32, 32, 3)


def test_adherence_is_that_of_the_averaged_weights(tmp_path, monkeypatch):
    quiet()
    run, seen = make_run(tmp_path), []
    task = make_diffusion(adherence=1)

    def look(prompts, seeds):
        seen.append(next(task.denoiser.parameters()).detach().clone())
        return [torch.zeros(32, 32, 3).numpy()]

    monkeypatch.setattr(task, "sample", look)
    ema = EMA([0.5])
    make_trainer(run, [ema], max_steps=4).fit(task, datamodule=make_shapes())
    name = next(iter(dict(task.named_parameters())))
    assert torch.equal(seen[-1], ema.average()[name])


def test_bfloat16_training_keeps_the_noise_schedule_exact(batch):
    task = make_diffusion(drop_caption=0.0)
    seen = []
    task.family = type(task.family)(
        "unet", task.family.encode, lambda denoiser, noisy, timestep, context: seen.append((noisy, timestep)) or noisy
    )
    task._loss(batch, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        task._loss(batch, 0.0)
    assert torch.equal(seen[0][1], seen[1][1])
    assert error(seen[1][0], seen[0][0]) < 1e-5


def test_losses_and_adherence_are_logged_and_previews_made(trained):
    run, _, rows = trained
    assert [row["step"] for row in rows if "val/loss" in row] == ["4", "8"]
    assert float(rows[-1]["val/adherence"]) == 0
    assert len(list((run.folder / "media").glob("step_*/samples.png"))) == 3


def test_frozen_parts_stay_out_of_checkpoints_and_as_they_were(trained):
    run, task, _ = trained
    stored = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[1] for name in stored} == {"unet", "text_encoder"}
    fresh = make_diffusion().pipe.vae.state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in task.pipe.vae.state_dict().items())


def test_a_killed_training_goes_on_bit_for_bit(tmp_path):
    quiet()
    whole, broken = (make_run(tmp_path / name).folder for name in ("whole", "broken"))

    def work(folder, *extra):
        run = Run.open(folder)
        trainer = make_trainer(run, [EMA([0.9]), *extra])
        trainer.fit(make_diffusion(adherence=1), datamodule=make_shapes(workers=1), ckpt_path=run.checkpoint)

    said = tmp_path / "said.txt"
    assert in_child(lambda: work(whole), said) == 0, said.read_text()
    for place in (At("batch", 3, signal.SIGKILL), At("validation", 8, signal.SIGKILL)):
        assert in_child(lambda place=place: work(broken, place), said) == -9
    assert in_child(lambda: work(broken), said) == 0, said.read_text()
    first, second = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (whole, broken))
    for name, weight in first["state_dict"].items():
        assert torch.equal(weight, second["state_dict"][name]), name
    files = [load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors") for folder in (whole, broken)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_what_is_trained_on(workers):
    batches = [iter(make_shapes(workers=n).train_dataloader()) for n in (0, workers)]
    for _ in range(4):
        one, other = (next(stream) for stream in batches)
        assert one["caption"] == other["caption"]
        assert torch.equal(one["image"], other["image"])
        assert one["number"].tolist() == other["number"].tolist()


def test_a_saved_pipeline_is_trained_further(tmp_path, batch):
    pipe = pipelines.stable_diffusion()
    pipe.save_pretrained(tmp_path)
    task = DiffusionTask(pipeline=str(tmp_path), train=["unet"], optimizer=ADAMW)
    assert all(torch.equal(a, b) for a, b in zip(task.denoiser.parameters(), pipe.unet.parameters(), strict=True))
    task._loss(batch, 0.1).mean().backward()
    assert not any(p.requires_grad for p in task.pipe.text_encoder.parameters())


@pytest.mark.parametrize("build", [pipelines.flux, pipelines.stable_diffusion_3, pipelines.pixart])
def test_other_families_train(build, batch):
    task = DiffusionTask(pipeline=build(), train=["transformer"], optimizer=ADAMW)
    loss = task._loss(batch, 0.1).mean()
    loss.backward()
    assert torch.isfinite(loss)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.denoiser.parameters())
    assert not any(p.requires_grad for part in task.frozen for p in part.parameters())


@pytest.mark.parametrize("build", [pipelines.wan, pipelines.cogvideox])
def test_video_latents_train_too(build):
    task = DiffusionTask(pipeline=build(), train=["transformer"], optimizer=ADAMW)
    latents = {"latents": torch.randn(2, 4, 2, 4, 4), "caption": ["a red circle", "a star"], "number": torch.arange(2)}
    task._loss(latents, 0.0).mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.denoiser.parameters())


def test_previews_of_clips_are_frames_of_the_size_that_is_trained():
    task = DiffusionTask(pipeline=pipelines.wan(), train=["transformer"], optimizer=ADAMW, steps=1, prompts=["a star"])
    latents = {"latents": torch.randn(1, 4, 2, 4, 4), "caption": ["a star"], "number": torch.arange(1)}
    task._loss(latents, 0.0)
    (strip,) = task.sample(["a star"], [0])
    assert strip.shape == (32, 4 * 32, 3), "four of five frames"
    (name, sheet), *rest = task.pictures([latents], 1)
    assert (name, sheet.dtype, rest) == ("samples", "uint8", [])


def test_half_weights_and_captions_of_another_world_are_refused_before_training(tmp_path):
    trainer = make_trainer(make_run(tmp_path / "half"), max_steps=1, precision="bf16-true")
    with pytest.raises(UserError, match="precision bf16-true is not supported; take bf16-mixed"):
        trainer.fit(make_diffusion(), datamodule=make_shapes())
    task = make_diffusion(adherence=2)
    task._captions = ["an old lighthouse"]
    with pytest.raises(UserError, match=r"adherence needs captions of shapes world .*; set adherence: 0"):
        task.on_validation_epoch_end()
    with pytest.raises(UserError, match="adherence is judged on pictures, and this pipeline makes clips"):
        DiffusionTask(pipeline=pipelines.wan(), train=["transformer"], optimizer=ADAMW, adherence=2)


def test_pictures_that_lack_what_their_captions_tell_are_refused(tmp_path):
    trainer = make_trainer(make_run(tmp_path), max_steps=1)
    with pytest.raises(UserError, match="cut off what captions tell of"):
        trainer.fit(make_diffusion(), datamodule=make_shapes(render_sizes=[32, 64]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": ["unett"]}, "no network 'unett' to train. Did you mean 'unet'"),
        ({"train": ["unet", "vae"]}, "'vae' is neither the denoiser nor a text encoder"),
        ({"scheduler": {**DDIM, "prediction_type": "noise"}}, "prediction_type 'noise'"),
        ({"drop_caption": 1.5}, "drop_caption must be a probability"),
        ({"timesteps": "normal"}, "timesteps must be uniform or logit_normal"),
        ({"scheduler": FLOW, "min_snr_gamma": 5.0}, "min_snr_gamma has no meaning"),
        ({"pipeline": "StableDiffusionPipelin"}, "neither a folder here nor"),
    ],
)
def test_bad_settings_are_refused(changes, said):
    with pytest.raises((UserError, FileNotFoundError), match=said):
        make_diffusion(**changes)


assert os.environ["HF_HUB_OFFLINE"] == "1"  # else the last case would ask the hub
