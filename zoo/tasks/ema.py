"""A moving average of the weights, in float32, that leaves buffers alone."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.errors import UserError


class EMA(Callback):
    """Averages the trainable parameters after every optimisation step: average += (1 - decay) (weight - average).

    Buffers are never averaged, since index tables and counters are no quantities to mix; the network keeps its own. Nor
    is the `discriminator` of an adversarial training, which nobody uses afterwards.
    While validation runs the averaged weights are live. The network's own weights come back also when validation
    breaks off, and a checkpoint always holds those; the averages are stored in it beside them.

    Args:
        decays: decay of each average, in [0, 1); the first one is used for validation, previews and final weights.
        ramp_up: start with short averages: decay at update n is at most (1 + n) / (10 + n).
        on_cpu: keep the averages in main memory.

    Raises:
        UserError: no decay, or one outside [0, 1).
    """

    def __init__(self, decays: list[float] | None = None, ramp_up: bool = False, on_cpu: bool = False) -> None:
        self.decays = [0.999] if decays is None else list(decays)
        if not self.decays or not all(0 <= decay < 1 for decay in self.decays):
            raise UserError(f"EMA: decays must be a list of numbers in [0, 1), got {self.decays}")
        self.ramp_up = ramp_up
        self.on_cpu = on_cpu
        self.updates = 0
        self._averages: dict[float, dict[str, Tensor]] = {}
        self._seen_step = 0
        self._live: dict[str, Tensor] | None = None  # the network's own weights while an average is in their place
        self._validation = ExitStack()

    def average(self, decay: float | None = None) -> dict[str, Tensor]:
        """The averaged parameters by name, float32 (float64 for float64 weights); empty before training.

        Args:
            decay: one of `decays`; None = the first.
        """
        return self._averages.get(self.decays[0] if decay is None else decay, {})

    def start(self, module: LightningModule) -> None:
        """Begin with the present weights, or move averages of a checkpoint to where they belong."""
        weights = _trainable(module)
        for decay in self.decays:
            stored = self._averages.get(decay, {name: weight.detach() for name, weight in weights.items()})
            if set(stored) != set(weights):
                odd = sorted(set(stored) ^ set(weights))
                raise UserError(f"EMA: the checkpoint's averages are of another network, see {odd[0]}; start a new run")
            self._averages[decay] = {
                name: torch.empty_like(weight, dtype=_wide(weight), device="cpu" if self.on_cpu else weight.device)
                .copy_(stored[name])
                .detach()
                for name, weight in weights.items()
            }

    @torch.no_grad()
    def update(self, module: LightningModule) -> None:
        """Take in the present weights once."""
        weights = _trainable(module)
        for decay, average in self._averages.items():
            if self.ramp_up:
                decay = min(decay, (1 + self.updates) / (10 + self.updates))
            targets = [average[name] for name in weights]
            sources = [w.detach().to(average[name]) for name, w in weights.items()]
            torch._foreach_lerp_(targets, sources, 1 - decay)  # pyright: ignore
        self.updates += 1

    @contextmanager
    def swapped(self, module: LightningModule, decay: float | None = None) -> Iterator[None]:
        """Put an average in the place of the weights, and the weights back at the end, whatever happens inside.

        Args:
            module: the module that is trained.
            decay: which average; None = the first.
        """
        average = self.average(decay)
        if not average or self._live is not None:  # nothing averaged yet, or it is in place already
            yield
            return
        weights = _trainable(module)
        self._live = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            _copy(average, weights)
            yield
        finally:
            _copy(self._live, weights)
            self._live = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set up after the weights and the checkpoint have reached their device."""
        self.start(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Average once per optimisation step, however many batches it accumulates."""
        if trainer.global_step > self._seen_step:
            self._seen_step = trainer.global_step
            self.update(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the average."""
        self._validation.enter_context(self.swapped(pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the weights themselves; the module has ended its epoch before this, with the average."""
        self._validation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Validation broke off: callbacks that save now must find the weights themselves."""
        self._validation.close()

    def state_dict(self) -> dict[str, Any]:
        """Averages and counters, plain tensors and numbers."""
        averages = [{"decay": decay, "weights": average} for decay, average in self._averages.items()]
        return {"averages": averages, "updates": self.updates, "seen_step": self._seen_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take averages and counters out of a checkpoint."""
        self._averages = {kept["decay"]: kept["weights"] for kept in state_dict["averages"]}
        self._averages = {decay: kept for decay, kept in self._averages.items() if decay in self.decays}
        self.updates = state_dict["updates"]
        self._seen_step = state_dict["seen_step"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A checkpoint taken while an average is in place still gets the weights themselves."""
        checkpoint["state_dict"].update(self._live or {})


@contextmanager
def averaged(module: LightningModule) -> Iterator[None]:
    """The averaged weights in place where the trainer has an `EMA`, else the weights as they are."""
    found = next((c for c in module.trainer.callbacks if isinstance(c, EMA)), None)  # pyright: ignore
    with found.swapped(module) if found else ExitStack():
        yield


def _trainable(module: LightningModule) -> dict[str, Tensor]:
    named = module.named_parameters()
    return {name: p for name, p in named if p.requires_grad and not name.startswith("discriminator.")}


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, weight in target.items():
        weight.copy_(source[name])
