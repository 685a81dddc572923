"""How fast training is and how much memory it took."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

try:
    import resource
except ImportError:  # Windows: memory is logged on a GPU only
    resource = None


class Throughput(Callback):
    """Logs perf/images_per_s (all ranks together) and perf/peak_gib (GPU, or this process without one).

    Time counts from batch to batch, waiting for data included, validation left out; the median over the last batches
    keeps a checkpoint or a preview in between from showing.

    Args:
        window: number of batches that the median is taken over.
    """

    def __init__(self, window: int = 50) -> None:
        self._rates: deque[float] = deque(maxlen=window)
        self._last: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run measures anew: it may run elsewhere."""
        self._rates.clear()
        self._last = None
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Take the time of one batch."""
        now = time.perf_counter()
        if self._last is not None:
            self._rates.append(_images(batch) * trainer.world_size / (now - self._last))
        self._last = now
        if self._rates:
            pl_module.log("perf/images_per_s", median(self._rates))
        gib = peak_gib(pl_module.device)
        if gib is not None:
            pl_module.log("perf/peak_gib", gib)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The next batch starts here, not before the validation."""
        if self._last is not None:
            self._last = time.perf_counter()


def peak_gib(device: torch.device) -> float | None:
    """Most memory in use so far, in GiB: allocated on a CUDA device, else resident for this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _images(batch: Any) -> int:  # noqa: ANN401
    """Length of the first tensor of a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else (batch,)
    return next((len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim), 0)
