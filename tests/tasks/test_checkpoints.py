import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from zoo.tasks.checkpoints import LastCheckpoint, replaced


class Line(LightningModule):
    """One weight, pulled towards 1; also validates, since that is where Lightning likes to save."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (self.weight - 1) ** 2

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", (self.weight - 1) ** 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder, steps, every, **settings):
    written = []

    class Watched(LastCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            written.append(trainer.global_step)

    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=[Watched(folder, every)],
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=None,
        val_check_interval=2,
        max_epochs=-1,
    )
    trainer.fit(Line(), [torch.zeros(1)] * 3, [torch.zeros(1)], **settings)
    return written


@pytest.mark.parametrize(("steps", "every", "expected"), [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 100, [2])])
def test_it_is_written_every_so_many_steps_and_once_at_the_end(tmp_path, steps, every, expected):
    assert train(tmp_path, steps, every) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_resumed_training_replaces_it_in_place(tmp_path):
    train(tmp_path, 4, 2)
    written = train(tmp_path, 7, 2, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    assert written == [6, 7]
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """Lightning's own way writes over the old file where the temporary folder lies on another disk."""
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")

    def break_off():
        with replaced(trainer, path) as partial:
            partial.write_bytes(b"ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert path.read_bytes() == b"old"
    with replaced(trainer, path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
