"""`zoo fit RECIPE`: trains into a new numbered run folder, or goes on with one that was ended."""

import argparse
import json
import logging
import os
import shutil
from typing import TYPE_CHECKING

from zoo.cli.options import DTYPES, add, open_working_folder
from zoo.pipelines.devices import torch_device

if TYPE_CHECKING:
    from zoo.recipe import Recipe
    from zoo.tasks.run import Run

log = logging.getLogger(__name__)

_USES = {  # task -> what its run is for
    "RestorationTask": "zoo restore IN OUT --model {}",
    "AdversarialTask": "zoo restore IN OUT --model {}",
    "DiffusionTask": "zoo sample --prompt TEXT --pipeline {}",
    "DistillationTask": 'zoo.apply(pipe, "{}")',
    "FeatureTask": "zoo evaluate --pipeline shapes-sd --features {}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo fit`."""
    parser.add_argument("recipe", help="a YAML file, or a name that `zoo recipes` lists")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.max_steps=1000")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="newest",
        metavar="RUN",
        help="go on with the newest unfinished run of this recipe, or with the folder RUN",
    )
    parser.set_defaults(out="runs")
    add(parser, "device", "dtype", "seed", "out", "json", "trust")


def overrides(args: argparse.Namespace) -> list[str]:
    """The overrides that were typed, and those that --device, --dtype and --seed stand for.

    Raises:
        UserError: this machine lacks the device.
    """
    texts = list(args.overrides)
    if args.device != "auto":
        device = torch_device(args.device)
        number = 1 if device.index is None else f"[{device.index}]"
        texts += [f"trainer.accelerator={device.type}", f"trainer.devices={number}"]
    if args.dtype:
        texts.append(f"trainer.precision={DTYPES[args.dtype]}")
    if args.seed is not None:
        texts.append(f"seed_everything={args.seed}")
    return texts


def run(args: argparse.Namespace) -> int:
    """Trains; prints where everything is."""
    from zoo.recipe import build, resolve, validate

    open_working_folder(args)
    recipe = resolve(args.recipe, overrides(args))
    validate(recipe, trust=args.trust)
    run, fresh = _open(args, recipe)
    if not fresh and _is_done(run, recipe):
        log.info("run %s is finished after %s steps; nothing is left to do", run.folder, run.status.get("step"))
        return _report(args, run, recipe)
    checkpoint = None if fresh else run.checkpoint
    built = None
    try:
        built = build(recipe, run=run.folder, trust=args.trust, quiet=args.quiet)
        log.info("run %s", run.folder)
        run.retarget(recipe.config, recipe.hash)
        path = str(checkpoint) if checkpoint else None
        built.trainer.fit(built.task, datamodule=built.data, ckpt_path=path, weights_only=True)
    except SystemExit as leave:
        log.warning("go on with: zoo fit %s --resume=%s", " ".join([args.recipe, *args.overrides]), run.folder)
        # Lightning exits with 1 after the second Ctrl-C
        raise SystemExit(130 if leave.code == 1 else leave.code) from leave
    except BaseException:
        if fresh and (built is None or built.trainer.global_step == 0) and "LOCAL_RANK" not in os.environ:
            shutil.rmtree(run.folder, ignore_errors=True)  # nothing was trained: the number is free again
        raise
    return _report(args, run, recipe) if built.trainer.is_global_zero else 0


def _open(args: argparse.Namespace, recipe: "Recipe") -> "tuple[Run, bool]":
    """The run to train, and whether it is new."""
    from zoo.tasks.run import Run

    if args.resume == "newest":
        found = Run.newest_unfinished(args.out, recipe.hash)
        if found is not None:
            return found, False
        log.warning("no unfinished run of this recipe below %s; a new one starts", args.out)
    elif args.resume is not None:
        return Run.open(args.resume), False
    head = [f"# zoo fit {args.recipe}", *(f"#   {text}" for text in recipe.overrides)]
    text = "\n".join([*head, recipe.text])
    return Run.create(args.out, text=text, config=recipe.config, hash=recipe.hash), True


def _is_done(run: "Run", recipe: "Recipe") -> bool:
    """Whether the run has done all the steps that the recipe asks for now."""
    goal = (recipe.config.get("trainer") or {}).get("max_steps", -1)
    status = run.status
    return status.get("state") == "finished" and (status.get("hash") == recipe.hash or 0 <= goal <= status["step"])


def _report(args: argparse.Namespace, run: "Run", recipe: "Recipe") -> int:
    """Says where things are."""
    from zoo.tracking import read_table

    table, _ = read_table(run.folder / "metrics.csv")
    scores: dict[str, float] = {}
    for row in table:
        scores |= {name: float(value) for name, value in row.items() if name.startswith("val/")}
    places = {
        "weights": run.folder / "weights.safetensors",
        "pipeline": run.folder / "pipeline",
        "pictures": run.folder / "media",
        "metrics": run.folder / "metrics.csv",
        "report": run.folder / "index.html",
        "checkpoint": run.folder / "checkpoints" / "last.ckpt",
    }
    found = {name: str(path) for name, path in places.items() if path.exists()}
    if args.json:
        print(json.dumps({"run": str(run.folder), **run.status, **found, "scores": scores}))
        return 0
    rows = {"run": f"{run.folder} ({run.status.get('state')}, {run.status.get('step')} steps)", **found}
    rows |= {name: f"{value:.4f} ({run.status.get('protocol')})" for name, value in scores.items()}
    use = _USES.get(recipe.config["model"]["class_path"].rpartition(".")[2])
    if use and {"weights", "pipeline"} & set(found):
        rows["use it"] = use.format(run.folder)
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")
    return 0
