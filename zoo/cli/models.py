"""`zoo list` and `zoo info`: what there is, without importing torch."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo import models, shipped
from zoo.cli.options import add
from zoo.errors import UserError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command that `parser` is for."""
    add(parser, "json")
    if parser.get_default("command") == "info":
        parser.add_argument("model", metavar="NAME|FILE", help="a model that `zoo list` shows, or a weight file")
        return
    parser.add_argument("pattern", nargs="?", default="*", help='such as "hat*"')
    parser.add_argument("--markdown", action="store_true", help="as the table of the README")


def run(args: argparse.Namespace) -> int:
    """Runs the one of the two commands that was called."""
    return _info(args) if args.command == "info" else _list(args)


def _list(args: argparse.Namespace) -> int:
    found = models.list_models(args.pattern)
    if not found:
        names = [facts.name for facts in models.list_models()]
        raise UserError(f"no model matches {args.pattern!r}.{nearest(args.pattern, names)} `zoo list` shows all.")
    if args.json:
        print(json.dumps([asdict(facts) | _recorded(facts.name) for facts in found], indent=2))
        return 0
    head = ["model", "family", "task", "upscale", "multiple", "dtypes", "licence", "weights", "measured", "paper"]
    rows = [
        [
            facts.name,
            facts.family,
            facts.task,
            f"x{facts.upscale}",
            str(facts.multiple),
            ", ".join(facts.dtypes),
            facts.licence,
            "shipped" if facts.shipped else "fetch",
            *map(_words, _recorded(facts.name).values()),
        ]
        for facts in found
    ]
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    if args.markdown:
        table.insert(1, ["-" * width for width in widths])
    for row in table:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if args.markdown else "  ".join(cells).rstrip())
    return 0


def _recorded(name: str) -> dict[str, Any]:
    """What index.yaml says of the quality of a variant's weights: measured by us, and the paper's."""
    row = shipped.index().get(name, {})
    return {"figures": row.get("figures"), "paper": row.get("paper")}


def _words(figures: object) -> str:
    if isinstance(figures, dict):
        return "; ".join(f"{name}: {value}" for name, value in figures.items())
    return "" if figures is None else str(figures)


def _info(args: argparse.Namespace) -> int:
    facts = _facts_of_file(Path(args.model)) if Path(args.model).exists() else _facts_of_name(args.model)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        print(f"{name:{width}}  {_words(text)}")
    return 0


def _facts_of_name(name: str) -> dict[str, Any]:
    found = [facts for facts in models.list_models() if facts.name == name]
    if not found:
        names = [facts.name for facts in models.list_models()]
        raise UserError(f"{name!r} is neither a model nor a file.{nearest(name, names)} `zoo list` shows all.")
    facts = asdict(found[0]) | shipped.index().get(name, {})
    file = shipped.weight_file(name)
    if file is not None:
        facts |= {"file": str(file), "bytes": file.stat().st_size}
    return facts


def _facts_of_file(path: Path) -> dict[str, Any]:
    """What a weight file or a run folder says of itself; this needs torch."""
    network = models.load(path)
    config = getattr(network, "config", {})
    needs = models.needs(network)
    return {
        "file": str(path),
        "family": models.family_of(network),
        "variant": getattr(network, "variant", None),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **asdict(needs),
        "config": config,
    }
