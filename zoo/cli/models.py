"""`zoo list` and `zoo info`: what there is, without importing torch."""

import argparse
import json
import re
from collections.abc import Sequence
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
    names, measured = _headlines(found, "figures")
    papers, published = _headlines(found, "paper")
    table = [["model", "task", "scale", "parameters", "weights", "measured", "paper"]]
    for facts, ours, theirs in zip(found, measured, published, strict=True):
        size = f"{facts.parameters:>10,}"
        weights = "shipped" if facts.shipped else "train" if shipped.trained_by(facts.name) else "fetch"
        scale = f"x{facts.upscale}" if facts.upscale else "-"
        table.append([facts.name, facts.task, scale, size, weights, ours, theirs])
    sentence = "; ".join(f"{title}: {', '.join(of)}" for title, of in (("measured", names), ("paper", papers)) if of)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    if args.markdown:
        table.insert(1, ["-" * width for width in widths])
    if sentence:
        print(sentence, end="\n\n")
    for row in table:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        print(f"| {' | '.join(cells)} |" if args.markdown else "  ".join(cells).rstrip())
    return 0


def _recorded(name: str) -> dict[str, Any]:
    """What index.yaml says of the quality of a variant's weights: measured by us, and the paper's."""
    row = shipped.index().get(name, {})
    return {"figures": row.get("figures"), "paper": row.get("paper")}


def _headlines(found: Sequence[models.Facts], key: str) -> tuple[list[str], list[str]]:
    """How the first figure of each model was measured, without repetition; and the figures.

    Where protocols differ by more than a crop of as many pixels as the scale, letters lead from one to the other.
    """
    rows = [_recorded(facts.name)[key] if facts.upscale else None for facts in found]  # of what makes images
    firsts = [next(iter((row or {}).items()), ("", "")) for row in rows]
    names = [re.sub(rf"\bcrop {f.upscale}\b", "crop = scale", name) for f, (name, _) in zip(found, firsts, strict=True)]
    different = list(dict.fromkeys(filter(None, names)))
    marks = {name: f" [{chr(97 + place)}]" if len(different) > 1 else "" for place, name in enumerate(different)}
    cells = [f"{value}{marks.get(name, '')}" for name, (_, value) in zip(names, firsts, strict=True)]
    return [f"{marks[name]} {name}".strip() for name in different], cells


def _lines(value: object) -> list[str]:
    """A fact as text: a line for each entry of a mapping."""
    if not isinstance(value, dict):
        return [", ".join(map(str, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)]
    lines = []
    for name, inner in value.items():
        if not isinstance(inner, dict):
            lines.append(f"{name}: {inner}")
        elif any(isinstance(item, dict) for item in inner.values()):
            lines += [f"{name}, {line}" for line in _lines(inner)]
        else:
            lines.append(f"{name}: {', '.join(f'{key} {item}' for key, item in inner.items())}")
    return lines


def _info(args: argparse.Namespace) -> int:
    facts = _facts_of_file(Path(args.model)) if Path(args.model).exists() else _facts_of_name(args.model)
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        for number, line in enumerate(_lines(value)):
            print(f"{name if number == 0 else '':{width}}  {line}")
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
    family = models.family_of(network)
    needs = models.needs(network) if models.lookup(family).needs else None
    return {
        "file": str(path),
        "family": family,
        "task": models.FAMILIES[family].task,
        "variant": getattr(network, "variant", None),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **(asdict(needs) if needs else {}),
        "config": config,
    }
