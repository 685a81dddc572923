"""How far training is: one bar over all steps on a terminal, a plain line now and then elsewhere."""

import sys
import time

from lightning.pytorch import Callback, LightningModule, Trainer
from tqdm import tqdm


class Progress(Callback):
    """Shows steps, loss, the newest validation scores, speed and the time that is left, on stderr.

    Args:
        every: seconds between two lines where stderr is no terminal.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self._bar: tqdm | None = None
        self._shown = 0.0
        self._started = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting at the step of the checkpoint."""
        self._started = (time.monotonic(), trainer.global_step)
        self._shown = time.monotonic()
        if trainer.is_global_zero and sys.stderr.isatty():
            total = trainer.max_steps if trainer.max_steps > 0 else None
            self._bar = tqdm(total=total, initial=trainer.global_step, unit="step", dynamic_ncols=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Show the step when it is time; reading the metrics more often would wait for the device."""
        now = time.monotonic()
        if not trainer.is_global_zero or now - self._shown < (0.5 if self._bar is not None else self.every):
            return
        self._shown = now
        self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """New scores are shown at once."""
        if trainer.is_global_zero and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the finished bar behind."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal's line to the message."""
        self._close()

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        scores = {name: f"{float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items())}
        scores = {name: text for name, text in scores.items() if name.startswith(("train/loss", "val/"))}
        measured = [name for name in scores if name.startswith("val/")]
        if measured:
            scores[measured[-1]] += f" ({getattr(module, 'protocol', 'no protocol')})"  # of all of them
        if self._bar is not None:
            self._bar.set_postfix(scores, refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
            return
        since, first = self._started
        rate = (trainer.global_step - first) / max(time.monotonic() - since, 1e-9)
        parts = [f"{name} {text}" for name, text in scores.items()]
        parts.append(f"{rate:.2f} steps/s")
        goal = ""
        if trainer.max_steps > 0:
            goal = f"/{trainer.max_steps}"
            left = (trainer.max_steps - trainer.global_step) / rate if rate else float("inf")
            parts.append(f"{tqdm.format_interval(left)} left" if rate else "")
        sys.stderr.write(f"step {trainer.global_step}{goal}: {', '.join(filter(None, parts))}\n")
        sys.stderr.flush()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
