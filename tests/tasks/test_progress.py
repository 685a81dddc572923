import io
import re
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from zoo.tasks.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def train(monkeypatch, stream, steps=6, **settings):
    """Trains a line on `stream` as stderr; returns what was written."""

    class Line(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.protocol = "PSNR-Y, crop 2, uint8"

        def training_step(self, batch, batch_idx):
            loss = (self.weight - 1) ** 2
            self.log("train/loss", loss.detach())
            self.log("train/lr", 0.1)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val/psnr_y", 31.25)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monkeypatch.setattr(sys, "stderr", stream)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[Progress(**settings)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        check_val_every_n_epoch=None,
        val_check_interval=3,
        max_epochs=-1,
    )
    trainer.fit(Line(), [torch.zeros(1)] * 3, [torch.zeros(1)])
    return stream.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_without_a_terminal_plain_lines_tell_step_loss_scores_speed_and_time(monkeypatch):
    lines = train(monkeypatch, io.StringIO(), every=0).splitlines()
    lines = [line for line in lines if line.startswith("step ")]
    assert len(lines) >= 6
    assert "\r" not in "".join(lines)
    assert re.fullmatch(r"step 1/6: train/loss 1, [\d.]+ steps/s, 0\d:\d\d left", lines[0])
    assert any("val/psnr_y 31.25 (PSNR-Y, crop 2, uint8)" in line for line in lines)
    assert "(PSNR-Y" not in lines[0], "no score, no protocol"
    assert not any("train/lr" in line for line in lines)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lines_keep_their_distance(monkeypatch):
    lines = [line for line in train(monkeypatch, io.StringIO(), every=3600).splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 3/6", "step 6/6"], "only validation scores are told at once"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_on_a_terminal_one_bar_runs_over_all_steps(monkeypatch):
    text = train(monkeypatch, Terminal())
    assert "6/6" in text
    assert "step 1/6" not in text
