"""Optimisers and learning-rate schedules from plain data, checked by name and argument."""

import inspect
import math
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from zoo.errors import UserError, nearest


class WarmupCosine(LambdaLR):
    """Linear rise to the optimiser's learning rate, then half a cosine down to a share of it.

    Args:
        optimizer: the optimiser.
        warmup: steps of the rise; the first step already has 1 / warmup of the rate.
        total: optimisation steps of the whole training, written in the recipe.
        floor: final rate as a share of the optimiser's, in [0, 1].
    """

    def __init__(self, optimizer: optim.Optimizer, warmup: int, total: int, floor: float = 0.0) -> None:
        if not 0 <= warmup < total or not 0 <= floor <= 1:
            raise UserError(
                f"schedule WarmupCosine: needs 0 <= warmup < total and 0 <= floor <= 1, "
                f"got warmup={warmup}, total={total}, floor={floor}"
            )

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / (total - warmup))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, share)


# LBFGS wants a closure, the plateau schedule a metric, the others code or built objects: none of it is plain data.
_REFUSED = {"Optimizer", "LBFGS", "LRScheduler", "ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR"}
_REFUSED |= {"SequentialLR", "ChainedScheduler", "SWALR"}


def build_optimizer(spec: Mapping[str, Any], params: Iterable[nn.Parameter]) -> optim.Optimizer:
    """An optimiser of torch.optim.

    Args:
        spec: {"class_path": "Adam", "init_args": {"lr": 2e-4}}; `torch.optim.Adam` is the same class.
        params: what it shall train.

    Raises:
        UserError: unknown name or argument, or a value that the optimiser refuses.
    """
    known = {
        name: cls for name, cls in vars(optim).items() if inspect.isclass(cls) and issubclass(cls, optim.Optimizer)
    }
    return _build("optimizer", spec, known, list(params))


def build_schedule(spec: Mapping[str, Any], optimizer: optim.Optimizer) -> LRScheduler:
    """A schedule of torch.optim.lr_scheduler, or WarmupCosine; it is stepped once per optimisation step.

    Args:
        spec: {"class_path": "MultiStepLR", "init_args": {"milestones": [5000], "gamma": 0.5}}.
        optimizer: whose learning rate it sets.

    Raises:
        UserError: unknown name or argument, or a value that the schedule refuses.
    """
    known = {**_classes(optim.lr_scheduler, LRScheduler), "WarmupCosine": WarmupCosine}
    return _build("schedule", spec, known, optimizer)


def _classes(module: ModuleType, base: type) -> dict[str, type]:
    return {name: cls for name, cls in vars(module).items() if inspect.isclass(cls) and issubclass(cls, base)}


def _build(what: str, spec: Mapping[str, Any], known: Mapping[str, Any], target: Any) -> Any:  # noqa: ANN401
    """The class that `spec` names, on `target`, with every argument checked against its signature."""
    if not isinstance(spec, Mapping) or "class_path" not in spec or set(spec) - {"class_path", "init_args"}:
        raise UserError(f"{what}: must be a mapping of class_path and init_args, got {spec!r}")
    name = str(spec["class_path"]).rpartition(".")[2]
    known = {key: cls for key, cls in known.items() if key not in _REFUSED}
    if name not in known:
        hint = nearest(name, known) or f" Known are {', '.join(sorted(known))}."
        raise UserError(f"{what} {spec['class_path']!r} is unknown or needs more than plain data.{hint}")
    arguments = dict(spec.get("init_args") or {})
    accepted = list(inspect.signature(known[name]).parameters)[1:]  # without the parameters or the optimiser
    for key in arguments:
        if key not in accepted:
            hint = nearest(key, accepted) or f" It takes {', '.join(accepted)}."
            raise UserError(f"{what} {name} has no argument {key!r}.{hint}")
    try:
        return known[name](target, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{what} {name}: {error}") from error
