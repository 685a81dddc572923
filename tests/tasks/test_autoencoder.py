"""Autoencoders: trained, judged by their reconstructions, written for diffusers."""

import diffusers
import pytest
import torch

from tests.tasks.tiny import make_run, make_trainer, quiet
from tests.tasks.tiny_generation import make_autoencoder, make_shapes
from zoo import tracking
from zoo.errors import UserError
from zoo.metrics.psnr_ssim import psnr
from zoo.tasks.ema import EMA
from zoo.tasks.previews import Previews


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    quiet()
    run = make_run(tmp_path_factory.mktemp("autoencoder"))
    task = make_autoencoder()
    trainer = make_trainer(run, [EMA([0.5]), Previews(every=4, count=2)], max_steps=8)
    trainer.fit(task, datamodule=make_shapes())
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    return run, task, rows


def test_the_written_autoencoder_reconstructs_as_validation_says(trained):
    run, _, rows = trained
    vae = diffusers.AutoencoderKL.from_pretrained(run.folder / "vae")
    values = []
    for batch in make_shapes().val_dataloader()[0]:
        with torch.no_grad():
            back = vae(batch["image"] * 2 - 1).sample / 2 + 0.5
        values += [psnr(b.clamp(0, 1), i) for b, i in zip(back, batch["image"], strict=True)]
    assert float(rows[-1]["val/psnr"]) == pytest.approx(sum(values) / len(values), abs=1e-3)
    assert float(rows[-1]["val/adherence"]) == 0, "nothing can be seen yet"


def test_latents_of_the_written_autoencoder_have_unit_variance(tmp_path):
    task = make_autoencoder()
    images = torch.rand(64, 3, 16, 16)
    with torch.no_grad():
        latents = task.network.encode(images * 2 - 1).latent_dist.mode()
    task.moments.copy_(torch.stack([latents.mean(), latents.square().mean()]))
    vae = diffusers.AutoencoderKL.from_pretrained(task.export(tmp_path))
    assert (latents.std() * vae.config.scaling_factor).item() == pytest.approx(1, abs=0.01)


def test_the_latents_seen_in_training_set_the_scale(trained):
    run, task, _ = trained
    assert task.moments.tolist() != [0, 1]
    stored = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(stored["state_dict"]["moments"], task.moments)


def test_previews_show_images_above_their_reconstructions(trained):
    run, *_ = trained
    assert sorted(p.name for p in (run.folder / "media").iterdir()) == ["step_000000", "step_000004", "step_000008"]
    assert (run.folder / "media" / "step_000008" / "reconstructions.png").stat().st_size > 1000
    assert "reconstructions" in (run.folder / "index.html").read_text()


def test_training_lowers_the_loss():
    quiet()
    task, batch = make_autoencoder(), next(iter(make_shapes().train_dataloader()))
    with torch.no_grad():
        before = (task(batch["image"]) - batch["image"]).abs().mean()
    optimizer = task.configure_optimizers()["optimizer"]
    for _ in range(20):
        optimizer.zero_grad()
        (task(batch["image"]) - batch["image"]).abs().mean().backward()
        optimizer.step()
    assert (task(batch["image"]) - batch["image"]).abs().mean() < 0.7 * before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": []}, "objectives is empty"),
        ({"kl_weight": -1.0}, "kl_weight must be a number >= 0"),
        ({"autoencoder": {"chanels": 3}}, "AutoencoderKL refuses"),
        ({"autoencoder": {"block_out_channels": [5], "norm_num_groups": 2}}, "AutoencoderKL refuses"),
    ],
)
def test_bad_settings_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        make_autoencoder(**changes)
