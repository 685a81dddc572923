import logging

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from zoo.data.crops import ValidationSet
from zoo.data.degradations import Jpeg
from zoo.data.realworld import RealWorld
from zoo.data.restoration import RestorationData
from zoo.data.stages import Stage
from zoo.errors import UserError

STAGES = [Stage(4, 4, 8), Stage(None, 2, 12)]


def data(**keywords):
    settings = {"source": "demo", "upscale": 2, "degradation": [Jpeg((60, 95), 0.5)], "stages": STAGES, "workers": 0}
    return RestorationData(**{**settings, "epoch_steps": 5, **keywords})


class Recorder(LightningModule):
    """Trains one number and writes down which draws and shapes it saw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((tuple(batch["number"].tolist()), tuple(batch["lq"].shape), tuple(batch["gt"].shape)))
        return (self.weight * batch["lq"].mean() - batch["gt"].mean()).square()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validated.append((dataloader_idx, batch["set"], batch["name"], tuple(batch["gt"].shape)))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def fit(folder, steps, source, checkpoint=None, **keywords):
    model = Recorder()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=steps, callbacks=[saver], **options, **keywords)
    trainer.fit(model, source, ckpt_path=checkpoint)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_continues_with_the_next_unseen_batch(workers, tmp_path):
    """From a checkpoint within the first epoch, at its end, and within the second: same draws, same weight."""
    unbroken = fit(tmp_path, 12, data(workers=workers))
    assert [shape[0] for _, shape, _ in unbroken.seen] == [4] * 4 + [2] * 8
    assert [shape[2] for _, shape, _ in unbroken.seen] == [8] * 4 + [12] * 8
    numbers = [number for batch, _, _ in unbroken.seen for number in batch]
    assert numbers == list(range(4 * 4 + 2 * 8))
    for step in (3, 5, 8):
        resumed = fit(tmp_path / "again", 12, data(workers=workers), tmp_path / f"step={step}.ckpt")
        assert resumed.seen == unbroken.seen[step:], step
        assert torch.equal(resumed.weight, unbroken.weight), step


@pytest.mark.filterwarnings("ignore")
def test_shorter_epochs_and_accumulation_of_lightning_are_respected(tmp_path):
    unbroken = fit(tmp_path, 6, data(), accumulate_grad_batches=2, limit_train_batches=6)
    shares = [tuple(b) for b, _, _ in unbroken.seen]
    assert [len(share) for share in shares] == [2] * 8 + [1] * 4
    assert [n for share in shares for n in share] == list(range(20))
    resumed = fit(tmp_path / "b", 6, data(), tmp_path / "step=4.ckpt", accumulate_grad_batches=2, limit_train_batches=6)
    assert resumed.seen == unbroken.seen[8:]
    assert torch.equal(resumed.weight, unbroken.weight)


@pytest.mark.filterwarnings("ignore")
def test_several_validation_sets_arrive_whole_and_named(tmp_path):
    sets = {"clean": ValidationSet("demo"), "jpeg75": ValidationSet("demo", [Jpeg(75)])}
    source = data(validation=sets)
    model = fit(tmp_path, 5, source, num_sanity_val_steps=0)
    expected = [(0, "clean", "chelsea", (1, 3, 300, 450)), (1, "jpeg75", "chelsea", (1, 3, 300, 450))]
    assert model.validated == expected
    clean, coded = (loader[0] for loader in source.val_dataloader())
    assert torch.equal(clean["gt"], coded["gt"])
    assert 0 < (clean["lq"] - coded["lq"]).abs().mean() < 0.02


def test_photos_are_validated_on_photos_and_others_on_nothing_by_default():
    assert list(data(source="photos").validation) == ["photos"]
    assert list(data().validation) == []


def test_batches_and_report(caplog):
    source = data(channels=1, stages=[Stage(None, 3, 200)])
    with caplog.at_level(logging.INFO):
        source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    assert batch["lq"].shape == (3, 1, 200, 200)
    assert batch["gt"].shape == (3, 1, 400, 400)
    assert batch["number"].dtype == torch.int64
    assert batch["gt"].min() >= 0
    assert batch["gt"].max() <= 1
    report = source.report()["train"]
    assert report.count == 1
    assert "1 images are enlarged by mirroring for patch_size 200" in caplog.text
    assert list(source.report()) == ["train"]


def test_validation_alone_needs_no_training_data():
    source = data(source="/nowhere", validation={"demo": ValidationSet("demo")})
    source.setup("validate")
    assert len(source.val_dataloader()) == 1
    with pytest.raises(FileNotFoundError, match="no such folder"):
        source.setup("fit")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"upscale": 0}, "upscale must be >= 1"),
        ({"channels": 2}, "channels 1 or 3"),
        ({"epoch_steps": 0}, "epoch_steps >= 1"),
        ({"stages": [Stage(3)]}, "the last stage must not end"),
    ],
)
def test_impossible_requests_are_one_sentence(keywords, message):
    with pytest.raises(UserError, match=message):
        data(**keywords)


def test_crops_too_small_for_a_step_are_told_before_training():
    small = data(degradation=[RealWorld(2, context=0)], stages=[Stage(None, 2, 16)], workers=1)
    with pytest.raises(UserError, match="RealWorld: an image of 32x32 shrinks"):
        small.setup("fit")
    data(degradation=[RealWorld(2)], stages=[Stage(None, 2, 16)]).setup("fit")
