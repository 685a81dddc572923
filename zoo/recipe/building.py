"""A resolved recipe becomes trainer, task and data, by Lightning's own parser."""

import logging
import tempfile
import time
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import UserError
from zoo.recipe.merge import dotted
from zoo.recipe.reading import Recipe, resolve
from zoo.recipe.schema import Walk

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger

_ADVERTS = ("litlogger", "litmodels", "GPU available", "TPU available", "HPU available", "Tip:", "Seed set to")
_KNOWN_WARNINGS = (
    ".*LightningCLI's args parameter.*",  # we never call it from a command line
    ".*Checkpoint directory .* exists and is not empty.*",  # our config.yaml lies in it
    ".*LeafSpec.* is deprecated.*",  # inside Lightning
    ".*does not have many workers.*",  # the recipe's choice
    ".*with manual optimization.*",  # checkpoints after the step are what we want
    ".*across ranks is zero.*",  # a recipe without validation
)
_TRIAL = {  # what a two-step trial never does, whatever its recipe says
    "max_steps": 2,
    "max_epochs": None,
    "accelerator": "cpu",
    "devices": 1,
    "strategy": "auto",
    "limit_val_batches": 1,
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Built:
    """What a recipe describes, ready for `trainer.fit(task, datamodule=data)`."""

    trainer: "Trainer"
    task: "LightningModule"
    data: "LightningDataModule"


@dataclass(frozen=True)
class Checked:
    """What `check` found: trainable parameters at full size, optimisation steps done, seconds they took."""

    parameters: int
    steps: int
    seconds: float


def build(recipe: Recipe, *, run: Path | None = None, trust: bool = False, quiet: bool = False) -> Built:
    """The trainer, task and data of a recipe.

    With a run folder the trainer also writes metrics, pictures and `checkpoints/last.ckpt`, saves on SIGTERM and
    SIGUSR1, and shows its progress.

    Args:
        recipe: from `resolve`.
        run: the folder to write to; None writes nothing.
        trust: let the recipe name any class that can be imported.
        quiet: no progress.

    Raises:
        UserError: the recipe names a class, key or value that it may not, in one sentence.
    """
    quieten()
    parts, classes = _checked(recipe, trust)
    name, every = _ours(recipe)
    parts["trainer"].setdefault("enable_model_summary", False)  # it prints to stdout, which belongs to results
    if run is None:
        silent = {"enable_checkpointing": False, "enable_progress_bar": False}
        return _lightning(parts | {"trainer": parts["trainer"] | silent}, classes)
    from zoo import tracking
    from zoo.tasks.checkpoints import LastCheckpoint
    from zoo.tasks.progress import Progress
    from zoo.tasks.resume import SaveOnSignal
    from zoo.tasks.run import Run
    from zoo.tasks.throughput import Throughput

    callbacks = [Throughput(), LastCheckpoint(run / "checkpoints", every), SaveOnSignal(Run(run))]
    if not quiet and parts["trainer"].get("enable_progress_bar") is not False:
        callbacks.insert(0, Progress())
    settings = {**parts["trainer"], "default_root_dir": str(run), "enable_progress_bar": False}
    loggers = tracking.loggers(run, tracking=name, name=recipe.path.stem, config=recipe.config)
    return _lightning(parts | {"trainer": settings}, classes, callbacks, loggers)


def check(recipe: Recipe, *, trust: bool = False) -> Checked:
    """Builds the recipe at full size on the meta device, then trains two steps of its smoke version on the CPU.

    Args:
        recipe: from `resolve`, without smoke.
        trust: as in `build`.

    Raises:
        UserError: what `resolve` and `build` raise.
    """
    from zoo.tasks.run import Run

    started = time.perf_counter()
    task = sketch(recipe, trust=trust).task
    small = resolve(recipe.path, recipe.overrides, smoke=True)
    config = {**small.config, "trainer": {**(small.config.get("trainer") or {}), **_TRIAL}, "tracking": "csv"}
    with tempfile.TemporaryDirectory(prefix="zoo-check-") as root:
        run = Run.create(root, text=recipe.text, config=config, hash=recipe.hash)
        built = build(replace(small, config=config), run=run.folder, trust=trust, quiet=True)
        built.trainer.fit(built.task, datamodule=built.data)
    parameters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return Checked(parameters, built.trainer.global_step, time.perf_counter() - started)


def sketch(recipe: Recipe, *, trust: bool = False) -> Built:
    """The task of a recipe on the meta device, its data, and a trainer for any machine.

    Args:
        recipe: from `resolve`.
        trust: as in `build`.

    Raises:
        UserError: as `build`.
    """
    quieten()
    import torch

    parts, classes = _checked(recipe, trust)
    parts["trainer"] = {key: _TRIAL[key] for key in ("accelerator", "enable_progress_bar", "enable_model_summary")}
    with torch.device("meta"):
        return _lightning(parts, classes)


def validate(recipe: Recipe, *, trust: bool = False) -> None:
    """Refuses what `build` would refuse before it builds anything.

    Raises:
        UserError: as `build`.
    """
    _checked(recipe, trust)


def quieten() -> None:
    """Lets Lightning speak as loud as zoo, without adverts, device lists and warnings about our own doings."""
    import lightning.pytorch  # noqa: F401 (importing it sets up its log)

    speakers = ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed")
    for speaker in speakers:
        logger = logging.getLogger(f"lightning.{speaker}")
        if _no_advert not in logger.filters:
            logger.addFilter(_no_advert)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.getLogger("zoo").getEffectiveLevel())
        if logging.getLogger().handlers:  # else every line would come twice
            logging.getLogger(name).handlers.clear()
    for text in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", text)


def _no_advert(record: logging.LogRecord) -> bool:
    return not any(word in record.getMessage() for word in _ADVERTS)


def _ours(recipe: Recipe) -> tuple[str, int]:
    """The values of `tracking` and `checkpoint_every`."""
    tracking, every = recipe.config.get("tracking", "auto"), recipe.config.get("checkpoint_every", 1000)
    if tracking not in ("auto", "csv", "wandb"):
        raise UserError(f"{recipe.where(('tracking',))}: tracking must be auto, csv or wandb, got {tracking!r}")
    if type(every) is not int or every < 1:
        raise UserError(f"{recipe.where(('checkpoint_every',))}: checkpoint_every must be a step count, got {every!r}")
    return tracking, every


def _checked(recipe: Recipe, trust: bool) -> tuple[dict[str, Any], set[str] | None]:
    """The parts for Lightning's parser, and the classes that it may import; None = any."""
    from lightning.pytorch import Trainer

    _ours(recipe)
    walk = Walk(recipe.where, trust)
    seed = recipe.config.get("seed_everything")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise UserError(f"{recipe.where(('seed_everything',))}: seed_everything must be a number, got {seed!r}")
    parts = walk.recipe(recipe.config, Trainer) | ({} if seed is None else {"seed_everything": seed})
    classes = None if trust else walk.classes
    with _fence(classes):
        for argument in walk.arguments:
            if not _fits(argument.annotation, argument.value):
                rule = f"must be {_type_name(argument.annotation)}, got {argument.value!r}"
                raise UserError(f"{recipe.where(argument.path)}: {dotted(argument.path)} {rule}")
    return parts, classes


def _fits(annotation: object, value: object) -> bool:
    """Whether jsonargparse takes the value for the annotation."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=annotation)
    except ValueError:  # an annotation that jsonargparse does not know; the class itself will judge
        return True
    try:
        parser.parse_object({"value": value})
    except ArgumentError:
        return False
    return True


def _type_name(annotation: object) -> str:
    """An annotation as a reader of recipes would say it."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_type_name, members)))
    if origin is typing.Literal:
        return " or ".join(map(repr, members))
    if origin in (list, tuple):
        return f"[{', '.join(map(_type_name, members))}{', ...' if origin is list else ''}]"
    if origin is dict:
        return f"a mapping of {_type_name(members[1])}"
    return "null" if annotation is types.NoneType else getattr(annotation, "__name__", str(annotation))


def _lightning(
    parts: dict[str, Any],
    classes: set[str] | None,
    callbacks: "Sequence[Callback]" = (),
    loggers: "Sequence[Logger]" = (),
) -> Built:
    """Lightning's parser over the parts: it checks what is left to check and builds trainer, task and data."""
    from jsonargparse import ArgumentError
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    class Parser(LightningArgumentParser):
        def add_class_arguments(self, *arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 (Lightning's signature)
            # Else a text that happens to name a file, or a web page, would be replaced by what stands there.
            return super().add_class_arguments(*arguments, **keywords | {"sub_configs": False})

    class Lightning(LightningCLI):
        def instantiate_trainer(self, **keywords: object) -> "Trainer":
            named = self.config_init["trainer"]["logger"]
            named = named if isinstance(named, list) else [named] if named else []
            own = [logger for logger in named if logger is not True]
            try:
                return super().instantiate_trainer(**keywords, logger=[*loggers, *own] or False)
            except UserError:
                raise
            except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
                raise UserError(f"trainer: Lightning refuses its settings: {_first(error)}") from error

    with _fence(classes):
        try:
            cli = Lightning(
                LightningModule,
                LightningDataModule,
                save_config_callback=None,
                parser_class=Parser,
                trainer_defaults={"callbacks": list(callbacks)},
                seed_everything_default=False,
                parser_kwargs={"exit_on_error": False},
                subclass_mode_model=True,
                subclass_mode_data=True,
                args=parts,
                run=False,
                auto_configure_optimizers=False,
            )
        except (ArgumentError, ValueError) as error:  # jsonargparse wraps what constructors raise
            raise _cause(error) from error
    if hasattr(cli.model, "agree"):
        cli.model.agree(cli.datamodule)
    return Built(cli.trainer, cli.model, cli.datamodule)


def _cause(error: Exception) -> Exception:
    """Of an error of jsonargparse, the one that a constructor raised, or the most telling line of its tree."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, UserError | OSError):
            return type(found)(*found.args)  # a new one: the old one cannot also follow from `error`
        found = found.__cause__ or found.__context__
    if "Parser key" not in str(error) and "Does not validate" not in str(error):
        return error
    lines = [line.strip(" -") for line in str(error).splitlines()]
    noise = (
        "Parser key",
        "Problem with",
        "Does not validate",
        "Subtypes",
        "Errors:",
        "Given value",
        "Expected <class 'None",
    )
    telling = [line for line in lines if line and not line.startswith(noise)] or lines
    return UserError(f"recipe: {telling[0]}")


def _first(error: Exception) -> str:
    """The first sentence of an error's message."""
    return " ".join(str(error).split()).split(". ", 1)[0]


@contextmanager
def _fence(classes: set[str] | None) -> Iterator[None]:
    """Inside, jsonargparse imports no other class by name: a second fence behind our own. None = no fence.

    Its settings are one table for the whole process without a way back, so the table is put back by hand; versions
    before 4.53 have none, and there our own fence stands alone.
    """
    from jsonargparse import _common, set_parsing_settings

    settings = getattr(_common, "parsing_settings", {})
    before = {key: settings[key] for key in ("import_path_verdicts", "import_paths_enforced") if key in settings}
    try:
        if len(before) == 2 and classes is not None:
            set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(classes))
        yield
    finally:
        settings.update(before)
