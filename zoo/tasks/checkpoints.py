"""The one checkpoint of a run, replaced in place while it trains."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` every so many optimisation steps and at the end of training, never into a logger's folder.

    Args:
        folder: where the file goes.
        every: optimisation steps between two writes.
    """

    def __init__(self, folder: Path, every: int) -> None:
        super().__init__(
            dirpath=folder,
            filename="last",
            every_n_train_steps=every,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # one file, replaced in place
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning writes here only when it never did before; the last steps would be lost to whoever trains on."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
