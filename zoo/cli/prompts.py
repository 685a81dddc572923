"""`zoo evaluate --pipeline P`: does a generator of shapes world do what prompts say, and how real do pictures look."""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli import options
from zoo.cli.progress import Progress
from zoo.errors import UserError
from zoo.files import write_file

if TYPE_CHECKING:
    from zoo.evaluate.generators import PromptScores

_NAMES = ("prompts.csv", "prompts.json", "prompts.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `zoo evaluate` takes for pipelines."""
    group = parser.add_argument_group("for pipelines from prompts to pictures, instead of a model")
    group.add_argument("--pipeline", metavar="P", help="as for zoo sample; judged on unseen prompts of shapes world")
    group.add_argument("--num", type=int, default=500, metavar="N", help="prompts (500)")
    group.add_argument("--things", type=int, metavar="N", help="only prompts of N things; else of one, two and three")
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps; else as the pipeline has it")
    group.add_argument("--guidance", type=float, metavar="X", help="guidance scale; else as the pipeline has it")
    group.add_argument("--features", default="shapes-features", metavar="F", help="network of FID and KID, or none")
    options.add(parser, "seed")


def run(args: argparse.Namespace) -> int:
    """Sample, judge and print; returns the exit code."""
    odd = [f"--{name}" for name in ("model", "data", "lq", "upscale", "jpeg", "noise") if getattr(args, name, None)]
    if odd or args.recipe:
        raise UserError(f"evaluate: {odd[0] if odd else args.recipe} is for restorers and --pipeline for generators")
    out = Path(args.out).expanduser() if args.out else None
    taken = [out / name for name in _NAMES if (out / name).exists()] if out is not None else []
    if taken and not args.force:
        raise FileExistsError(f"{taken[0]}: exists already; --force replaces it, or name another --out")
    from zoo.evaluate.generators import PromptTrial
    from zoo.media import write_image
    from zoo.pipelines.devices import torch_device
    from zoo.pipelines.sampling import Settings

    settings = Settings(steps=args.steps, guidance=args.guidance, seed=args.seed or 0)
    features = None if args.features == "none" else args.features
    device = torch_device(args.device)
    trial = PromptTrial(args.pipeline, args.num, settings, things=args.things, features=features, device=device)
    with Progress("pictures", args.num, quiet=args.quiet) as bar:
        rows = trial.run(lambda done, total, note: bar.update(done, total, note))
    print(json.dumps(_plain(rows, trial.protocol), indent=2) if args.json else table(rows, trial.protocol))
    if out is not None:
        judged = next(row for row in rows if row.name == trial.sampler.name)
        write_file(out / "prompts.csv", _csv(rows, trial.protocol), force=args.force)
        write_file(out / "prompts.json", json.dumps(_plain(rows, trial.protocol), indent=2), force=args.force)
        write_image(out / "prompts.png", trial.figure(judged), force=args.force)
        if not args.quiet and not args.json:
            print(f"{out}: {', '.join(_NAMES)}")
    return 0


def table(rows: "Sequence[PromptScores]", protocol: str) -> str:
    """Shares in per cent: everything right by number of things, then each attribute; FID and KID where they exist."""
    columns = list(_values(rows[0]))
    body = [["", *columns]]
    for row in rows:
        body.append([row.name, *("" if value != value else f"{100 * value:.1f}" for value in _values(row).values())])
    widths = [max(len(line[column]) for line in body) for column in range(len(body[0]))]
    lines = [f"prompt adherence in per cent: {protocol}"]
    for line in body:
        cells = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())
    for row in rows:
        lines += [f"{row.name}: {score.label} {score}" for score in row.distances]
    return "\n".join(lines)


def _values(row: "PromptScores") -> dict[str, float]:
    from zoo.metrics.prompt import CORE, EXTRA

    counts = {f"{n} thing{'s' if n > 1 else ''}": row.share(things=n) for n in sorted(set(row.things))}
    return {"all right": row.share(), **counts} | {name: row.share(name) for name in (*CORE, *EXTRA)}


def _plain(rows: "Sequence[PromptScores]", protocol: str) -> dict[str, Any]:
    found = {}
    for row in rows:
        distances = {score.label: score.value for score in row.distances}
        found[row.name] = {name: value for name, value in _values(row).items() if value == value} | distances
    return {"protocol": protocol, "rows": found}


def _csv(rows: "Sequence[PromptScores]", protocol: str) -> str:
    """One line per row of the table."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    scores = [score.metric for score in rows[0].distances]
    writer.writerow(["row", "protocol", *_values(rows[0]), *scores])
    for row in rows:
        distances = [score.value for score in row.distances] or [""] * len(scores)
        writer.writerow([row.name, protocol, *(f"{value:.4f}" for value in _values(row).values()), *distances])
    return stream.getvalue()
