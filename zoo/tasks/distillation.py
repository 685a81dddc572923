"""Training of a student whose attention a plug-in has made cheaper, beside the denoiser that it was."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import UserError, nearest
from zoo.models.plugins.plugin import RUN, apply
from zoo.tasks.diffusion import DiffusionTask

LOSSES = ("target", "prediction", "align")


class DistillationTask(DiffusionTask):
    """Trains the parameters of a plug-in; the denoiser as it was is the teacher. All other parts stay as they are.

        L = target MSE(student, target) + prediction MSE(student, teacher) + align mean_l MSE(a_l student, a_l teacher)

    The target is what the scheduler's config says: noise, velocity, sample or flow. a_l is the output of a layer that
    the plug-in names, in the student on the student's own activations. Both see the same noise and the same captions,
    dropped or not. It also logs train/target, train/prediction and train/align, each without its weight.

    Source: LinFusion, src/distill; CLEAR, distill.py.

    Args:
        pipeline: folder, shipped name or hub id of the teacher, or a class into which `parts` go; in Python also a
            pipeline object, whose denoiser is changed.
        plugin: name of a plug-in, or its name and settings, such as {name: clear-8, down_factor: 4}.
        optimizer: as for RestorationTask.
        losses: weights of target, prediction and align; 0 or left out = not computed.
        weights: of a student to go on with, as for `zoo.apply`; null = it begins as the settings of the plug-in say.
        teacher_forcing: align each layer on the teacher's activations instead.
        parts: as for DiffusionTask.
        schedule: likewise.
        drop_caption: likewise, decided once for both.
        min_snr_gamma: likewise; align has no such weight.
        timesteps: likewise.
        adherence: likewise, of the student.
        prompts: likewise.
        steps: likewise.
        guidance: likewise.
        seed: likewise.

    Raises:
        FileNotFoundError: a part is not there.
        UserError: unknown losses or plug-ins, or a plug-in that does not fit the pipeline.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        plugin: str | dict[str, Any],
        optimizer: dict[str, Any],
        losses: dict[str, float] | None = None,
        weights: str | None = None,
        teacher_forcing: bool = False,
        parts: dict[str, str | dict[str, Any]] | None = None,
        schedule: dict[str, Any] | None = None,
        drop_caption: float = 0.0,
        min_snr_gamma: float | None = None,
        timesteps: str = "uniform",
        adherence: int = 0,
        prompts: list[str] | None = None,
        steps: int = 25,
        guidance: float = 4.0,
        seed: int = 0,
    ) -> None:
        losses = {"target": 1.0, "prediction": 0.5, "align": 0.5} if losses is None else losses
        for name, weight in losses.items():
            if name not in LOSSES:
                raise UserError(f"task: loss {name!r} is unknown.{nearest(name, LOSSES)}")
            if not weight >= 0:
                raise UserError(f"task: the weight of {name} must be at least 0, got {weight}")
        if not any(losses.values()):
            raise UserError(f"task: one of {', '.join(LOSSES)} must have a weight above 0")
        self._settings = (plugin, weights)
        super().__init__(
            pipeline=pipeline,
            train=[],
            optimizer=optimizer,
            parts=parts,
            schedule=schedule,
            drop_caption=drop_caption,
            min_snr_gamma=min_snr_gamma,
            timesteps=timesteps,
            adherence=adherence,
            prompts=prompts,
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        self.losses = {name: losses.get(name, 0.0) for name in LOSSES}
        self.teacher_forcing = teacher_forcing

    def _to_train(self, modules: dict[str, nn.Module], names: list[str]) -> nn.ModuleDict:
        """The parameters of the plug-in; the teacher is kept where checkpoints do not see it."""
        denoiser = modules[self.family.denoiser]
        self.frozen.append(copy.deepcopy(denoiser))  # before: copies carry plug-ins
        plugin, weights = self._settings
        self.handle = apply(denoiser, plugin, weights)
        return nn.ModuleDict({"plugin": _Parameters(self.handle.plugin.parameters())})

    @property
    def teacher(self) -> nn.Module:
        """The denoiser as it was."""
        return self.frozen[-1]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """As in DiffusionTask; the parts of the loss are logged too."""
        loss = super().training_step(batch, batch_idx)
        for name, part in self._parts.items():
            self.log(f"train/{name}", part.detach().mean())
        return loss

    def _loss(self, batch: Mapping[str, Any], drop: float) -> Tensor:
        """Weighted sum of the losses, one value per sample, (b,)."""
        latents = self._latents(batch)
        given = self.noising(latents, batch["number"])
        context = self._context(batch, (given.luck < drop).tolist())
        names = self.handle.plugin.align() if self.losses["align"] else []
        predict = self.family.predict
        with torch.no_grad(), watched(self.teacher, names) as taught:
            if names or self.losses["prediction"]:
                goal = predict(self.teacher, given.latents, given.timestep, context).float()
        with watched(self.denoiser, names) as learnt:
            predicted = predict(self.denoiser, given.latents, given.timestep, context).float()
        self._parts = {}
        if self.losses["target"]:
            self._parts["target"] = given.weight * _error(predicted, given.target.float())
        if self.losses["prediction"]:
            self._parts["prediction"] = given.weight * _error(predicted, goal)
        if names:
            outputs = {name: learnt[name].output for name in names}
            if self.teacher_forcing:
                layers = self.handle.plugin.layers
                outputs = {name: _joined(layers[name](*taught[name].args, **taught[name].kwargs)) for name in names}
            errors = [_error(outputs[name].float(), taught[name].output.float()) for name in names]
            self._parts["align"] = torch.stack(errors).mean(0)
        return torch.stack([self.losses[name] * part for name, part in self._parts.items()]).sum(0)

    def export(self, folder: Path) -> Path:
        """Write a folder `plugin` with the student's own tensors; `zoo.apply(pipe, run)` takes the run.

        Args:
            folder: where `plugin` is put.
        """
        return self.handle.save_pretrained(folder / RUN)


class _Parameters(nn.Module):
    """Parameters that belong to other modules, under their names in the files of the plug-in."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter.requires_grad_(True))


class _Seen:
    """What a layer was given and what it returned, (b, n, c); all of the tokens where there are two kinds."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def watched(network: nn.Module, names: list[str]) -> Iterator[dict[str, _Seen]]:
    """What goes through layers of a network meanwhile.

    Args:
        network: any.
        names: of its layers.
    """
    seen = {name: _Seen() for name in names}
    hooks = [network.get_submodule(name).register_forward_hook(_watch(seen[name]), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _watch(seen: _Seen) -> Any:  # noqa: ANN401
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401
        seen.args, seen.kwargs, seen.output = args, kwargs, _joined(output)

    return hook


def _joined(output: Any) -> Tensor:  # noqa: ANN401
    return torch.cat(output, 1) if isinstance(output, tuple) else output


def _error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(1)
