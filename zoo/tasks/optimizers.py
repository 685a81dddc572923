"""Optimisers and learning-rate schedules from plain data, checked by name and argument."""

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import SWALR

from zoo.errors import UserError, nearest


class WarmupCosine(LambdaLR):
    """Linear rise to the optimiser's learning rate, a while at it, then half a cosine down to a share of it.

    Args:
        optimizer: the optimiser.
        warmup: steps of the rise; the first step already has 1 / warmup of the rate.
        total: optimisation steps of the whole training, written in the recipe.
        floor: final rate as a share of the optimiser's, in [0, 1].
        hold: steps at the full rate, after those of the rise.
    """

    def __init__(self, optimizer: optim.Optimizer, warmup: int, total: int, floor: float = 0.0, hold: int = 0) -> None:
        start = warmup + hold
        if warmup < 0 or hold < 0 or start >= total or not 0 <= floor <= 1:
            raise UserError(
                f"schedule WarmupCosine: needs 0 <= warmup, 0 <= hold, warmup + hold < total, 0 <= floor <= 1, "
                f"got warmup={warmup}, hold={hold}, total={total}, floor={floor}"
            )

        def share(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, max(0, step - start) / (total - start))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, share)


# LBFGS wants a closure, the plateau schedule a metric, the others code or built objects: none of it is plain data.
_REFUSED = (
    optim.Optimizer,
    optim.LBFGS,
    LRScheduler,
    lr_scheduler.ReduceLROnPlateau,
    LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
    SWALR,
)


def _below(module: ModuleType, base: type) -> dict[str, type]:
    classes = {name: item for name, item in vars(module).items() if inspect.isclass(item) and issubclass(item, base)}
    return {name: item for name, item in classes.items() if name[0] != "_" and item not in _REFUSED}


# What a recipe may name; see also zoo/recipe/schema.py.
OPTIMIZERS = _below(optim, optim.Optimizer)
SCHEDULES = {"WarmupCosine": WarmupCosine} | _below(lr_scheduler, LRScheduler)


def build_optimizer(spec: Mapping[str, Any], params: Iterable[nn.Parameter]) -> optim.Optimizer:
    """An optimiser of torch.optim, or another one by its import path.

    Args:
        spec: {"class_path": "Adam", "init_args": {"lr": 2e-4}}; `torch.optim.Adam` is the same class.
        params: what it shall train.

    Raises:
        UserError: unknown name or argument, or a value that the optimiser refuses.
    """
    return _build("optimizer", spec, OPTIMIZERS, optim.Optimizer, list(params))


def build_schedule(spec: Mapping[str, Any], optimizer: optim.Optimizer) -> LRScheduler:
    """A schedule of torch.optim.lr_scheduler, WarmupCosine, or another one by its import path.

    It is stepped once per optimisation step.

    Args:
        spec: {"class_path": "MultiStepLR", "init_args": {"milestones": [5000], "gamma": 0.5}}.
        optimizer: whose learning rate it sets.

    Raises:
        UserError: unknown name or argument, or a value that the schedule refuses.
    """
    return _build("schedule", spec, SCHEDULES, LRScheduler, optimizer)


def _build(what: str, spec: Mapping[str, Any], known: Mapping[str, Any], base: type, target: Any) -> Any:  # noqa: ANN401
    """The class that `spec` names, on `target`, with every argument checked against its signature."""
    if not isinstance(spec, Mapping) or "class_path" not in spec or set(spec) - {"class_path", "init_args"}:
        raise UserError(f"{what}: must be a mapping of class_path and init_args, got {spec!r}")
    name = str(spec["class_path"])
    found = _imported(name) if "." in name else known.get(name)
    if not inspect.isclass(found) or not issubclass(found, base) or found in _REFUSED:
        hint = nearest(name.rpartition(".")[2], known) or f" Known are {', '.join(sorted(known))}."
        raise UserError(f"{what} {name!r} is unknown or needs more than plain data.{hint}")
    arguments = dict(spec.get("init_args") or {})
    parameters = list(inspect.signature(found).parameters.values())[1:]  # without the parameters or the optimiser
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in arguments:
        if key not in accepted and not any(p.kind is p.VAR_KEYWORD for p in parameters):
            hint = nearest(key, accepted) or f" It takes {', '.join(accepted)}."
            raise UserError(f"{what} {found.__name__} has no argument {key!r}.{hint}")
    try:
        return found(target, **arguments)  # pyright: ignore
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{what} {found.__name__}: {error}") from error


def _imported(path: str) -> object:
    """What stands at a dotted path; None when nothing does."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def configured(
    params: Iterable[nn.Parameter], optimizer: Mapping[str, Any], schedule: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What Lightning wants of `configure_optimizers`: an optimiser and its schedule, stepped every optimisation step.

    Args:
        params: what is trained.
        optimizer: as for `build_optimizer`.
        schedule: as for `build_schedule`; None keeps the learning rate.
    """
    built = build_optimizer(optimizer, params)
    if schedule is None:
        return {"optimizer": built}
    return {"optimizer": built, "lr_scheduler": {"scheduler": build_schedule(schedule, built), "interval": "step"}}
