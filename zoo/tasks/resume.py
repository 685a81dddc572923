"""Callbacks' part of exact resume: a run folder is left in a state from which training goes on bit for bit."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from zoo import tracking
from zoo.tasks.checkpoints import replaced
from zoo.tasks.ema import averaged
from zoo.tasks.run import Run, rank

__all__ = ["Run", "SaveOnSignal", "write_run_weights"]

log = logging.getLogger(__name__)

EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130}  # what a shell reports for a process that the signal ends


class SaveOnSignal(Checkpoint):
    """Keeps a run resumable: its status, weights with every checkpoint, and one when somebody asks the process to stop.

    SIGTERM and Ctrl-C: finish the optimisation step, save checkpoints/last.ckpt and weights.safetensors, exit with 143
    or 130. A second Ctrl-C stops at once and leaves the last checkpoint. SIGUSR1: save and go on; it is left alone
    where another handler, such as SLURM's requeue, has it. A signal during validation is answered after it.

    It is a `Checkpoint` because Lightning runs these after all other callbacks: an EMA must have taken in the step.

    Args:
        run: the run that is trained; None = the trainer's default_root_dir.
    """

    def __init__(self, run: Run | None = None) -> None:
        self._run = run
        self._asked: str | None = None
        self._leaving: int | None = None
        self._step_before = 0

    @property
    def run(self) -> Run:
        """The run that is trained; known from `setup` on."""
        assert self._run is not None
        return self._run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run folder."""
        self._run = self._run or Run(trainer.default_root_dir)
        self._asked = self._leaving = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from the first moment on; Lightning has set its own handlers just before."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, and say that the run is under way and how it is measured."""
        self._listen(trainer)
        protocol = str(getattr(pl_module, "protocol", "no protocol"))
        self.run.mark("running", trainer.global_step, protocol=protocol)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Leave, when the step before was the last one: by now its metrics are logged."""
        self._leave(trainer)
        self._step_before = trainer.global_step
        _log_under(trainer, trainer.global_step)
        epochs = trainer.fit_loop.epoch_progress
        if epochs.current.ready == epochs.current.processed:  # pyright: ignore
            # Resumed from the last batch of an epoch, Lightning forgets to open the next one, and a second resume
            # would not know where it stands.
            epochs.increment_ready()
            epochs.increment_started()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave before a validation; the resumed run starts with it."""
        self._leave(trainer)
        if not trainer.sanity_checking:
            _log_under(trainer, trainer.global_step - 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Answer a signal once the optimiser has stepped: gradients under accumulation are in no checkpoint."""
        if trainer.global_step == self._step_before:
            return
        asked = self._asked
        if trainer.world_size > 1:  # saving is collective: all ranks answer at the same step
            asked = _agree(trainer, asked)
        if asked is None:
            return
        self._asked = None
        self._save(trainer)
        if asked in EXIT_CODES:
            self.run.mark("interrupted", trainer.global_step)
            log.info("%s: saved step %d, leaving", asked, trainer.global_step)
            self._leaving = EXIT_CODES[asked]
        else:
            log.info("%s: saved step %d, going on", asked, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave also when the signal came in the last step of an epoch."""
        self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The final weights."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Whatever ended the training, the run can be resumed from its last checkpoint."""
        if self._run is not None:  # else it never began
            self._run.mark("interrupted", trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finish a run that was killed between its last checkpoint and its end: Lightning has nothing to do for it."""
        if stage == "fit" and trainer.global_step == trainer.max_steps and self.run.status.get("state") != "finished":
            self._finish(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the weights file first, and make a resumed run repeat the validation that is due at this step.

        Lightning would take it as done, yet the process may be killed before or in it. Its loop repeats a validation
        that the counters show as begun and not finished; metrics of the same step replace each other in the table.

        The weights go first, so that a kill between the two leaves no checkpoint whose average nobody can load.
        """
        write_run_weights(self.run, pl_module)
        progress = checkpoint["loops"]["fit_loop"].get("epoch_loop.val_loop.batch_progress")
        if progress is not None:
            begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress.update(total=begun, current=dict(begun), is_last_batch=False)
        if trainer.is_global_zero:
            self.run.mark(self.run.status.get("state", "running"), trainer.global_step)

    def _save(self, trainer: Trainer) -> None:
        with replaced(trainer, self.run.folder / "checkpoints" / "last.ckpt") as partial:
            trainer.save_checkpoint(partial)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        written = write_run_weights(self.run, module)
        if written is not None:
            tracking.log_artifact(trainer.loggers, written, f"weights-{self.run.folder.resolve().name}")
        self.run.mark("finished", trainer.global_step)

    def _leave(self, trainer: Trainer) -> None:
        if self._leaving is not None and trainer.global_step != trainer.max_steps:  # else it ends in a moment anyway
            raise SystemExit(self._leaving)

    def _listen(self, trainer: Trainer) -> None:
        """Take over the signals from Lightning, whose SIGTERM handler ends the run without a checkpoint.

        Lightning noted all handlers when it set its own, and gives them back when training ends.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            number = getattr(signal, name, None)
            if name == "SIGTERM" and trainer.received_sigterm:  # it came before we listened
                trainer._signal_connector.received_sigterm = False
                self._asked = name
            if number is not None and (name != "SIGUSR1" or signal.getsignal(number) in (None, signal.SIG_DFL)):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self._asked == "SIGINT":
            raise KeyboardInterrupt
        if self._asked not in EXIT_CODES:  # a wish to save does not cancel a wish to stop
            self._asked = name


def write_run_weights(run: Run, module: LightningModule) -> Path | None:
    """Write what a run is made for, from the average where there is one. Rank 0 only."""
    if rank() != 0:
        return None
    with averaged(module):
        return module.export(run.folder)  # pyright: ignore


def _log_under(trainer: Trainer, index: int) -> None:
    """Set the index of the optimisation step under which Lightning logs: after some resumes its own is off by one."""
    if trainer.lightning_module.automatic_optimization:  # else one step may be several steps of optimisers
        trainer.fit_loop.epoch_loop._batches_that_stepped = index


def _agree(trainer: Trainer, asked: str | None) -> str | None:
    """The strongest wish that any rank has heard."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if trainer.strategy.reduce_boolean_decision(asked == name, all=False):
            return name
    return None
