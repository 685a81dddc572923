"""The one checkpoint of a run, replaced in place while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


@contextmanager
def replaced(trainer: Trainer, path: Path) -> Iterator[Path]:
    """The name to write to instead of `path`, which is replaced at the end.

    Lightning writes through the system's temporary folder. Where that lies on another disk it copies over the old file,
    and a kill in that moment would leave neither; a rename inside one folder cannot.
    """
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    if trainer.is_global_zero:
        partial.replace(path)
    trainer.strategy.barrier()


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

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with replaced(trainer, Path(filepath)) as partial:
            super()._save_checkpoint(trainer, str(partial))
        self._last_checkpoint_saved = filepath

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning writes here only when it never did before; the last steps would be lost to whoever trains on."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
