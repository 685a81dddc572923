"""`zoo evaluate` and `zoo compare`: tables whose every number says how it was measured."""

import argparse
import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from zoo import shipped
from zoo.cli import options, prompts
from zoo.cli.progress import Progress
from zoo.cli.restore import parse_tile
from zoo.errors import UserError, nearest
from zoo.files import write_file

if TYPE_CHECKING:
    from zoo.evaluate.restorers import Row, Scores, Trial

_KEYS = {  # of a recipe: type, and how an error calls it
    "model": (str, "a name, a weight file or a run folder"),
    "data": (str, "photos, demo or a folder"),
    "split": (str, "train or valid"),
    "lq": (str, "a folder"),
    "template": (str, "a name with {} in it"),
    "upscale": (int, "a whole number"),
    "degradation": (str, "a text such as bicubic+jpeg75, or a list of them"),
    "protocol": (str, "basicsr, rgb, matlab or histoformer"),
}
_DEFAULTS = {"data": "photos", "split": "valid", "degradation": "bicubic", "protocol": "basicsr"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo evaluate` and `zoo compare`."""
    if parser.get_default("command") == "compare":
        parser.add_argument("models", nargs="+", metavar="MODEL", help="names, weight files, run folders or bicubic")
    else:
        parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="such as photos-x2; flags go before its keys")
        parser.add_argument("--model", metavar="M", help="a name, a weight file, a run folder or bicubic")
        prompts.add_arguments(parser)
    parser.add_argument("--data", metavar="D", help="photos (default), demo, or a folder of images or of pairs")
    parser.add_argument("--split", metavar="S", help="valid (default) or train, where the data have both")
    parser.add_argument("--lq", metavar="DIR", help="degraded images, where they lie in no known layout")
    parser.add_argument("--template", metavar="T", help="name of an lq file for {}, the gt name, such as {}x4")
    parser.add_argument("--upscale", type=int, metavar="N", help="gt size over lq size; default: that of the model")
    parser.add_argument("--protocol", metavar="P", help="basicsr (default), rgb, matlab, histoformer")
    parser.add_argument("--jpeg", type=int, metavar="Q", help="save the input as JPEG of this quality first")
    parser.add_argument("--noise", type=float, metavar="S", help="add Gaussian noise of S/255 to the input first")
    parser.add_argument("--ensemble", action="store_true", help="mean over 8 flips and turns of every input")
    parser.add_argument("--lpips", metavar="FILE", help="weights of AlexNet or VGG16; else where torch.hub keeps them")
    parser.add_argument("--worst", type=int, default=3, metavar="K", help="pictures of so many images, with --out")
    parser.add_argument("--tile", type=parse_tile, default="auto", metavar="N", help="side of the tiles, auto or off")
    options.add(parser, "padding")
    options.add(parser, "device", "dtype", "out", "force", "json")


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    if getattr(args, "pipeline", None):
        return prompts.run(args)
    setting = _setting(args)
    models = args.models if args.command == "compare" else [setting.pop("model")]
    out = Path(args.out).expanduser() if args.out else None
    from zoo.evaluate.restorers import Trial, steps_of

    degradations = setting.pop("degradation")
    for degradation in degradations:
        steps_of(degradation)
    if args.worst < 0:
        raise UserError(f"{args.command}: --worst must be 0 or more, got {args.worst}")
    if out is not None:
        _refuse_existing(out, args.force)
    place = {"tile": args.tile, "padding": args.padding, "ensemble": args.ensemble}
    place |= {"device": args.device, "dtype": args.dtype or "float32", "lpips": args.lpips}
    trial = Trial(models, degradation=degradations[0], **place, **setting)
    tables: list[list[Scores]] = []
    for degradation in degradations:
        trial.degrade_by(degradation)
        with Progress("images", len(trial.pairs) * len(models), quiet=args.quiet) as bar:
            tables.append(trial.run(lambda done, total, name, bar=bar: bar.update(done, total, note=name)))
        if not args.json:
            print(table(tables[-1]), end="\n\n", flush=True)
    if args.json:
        print(json.dumps(_plain(tables), indent=2))
    if out is not None:
        _write(out, trial, degradations, tables, args)
    return 0


def _write(
    out: Path,
    trial: "Trial",
    degradations: Sequence[str],
    tables: "Sequence[Sequence[Scores]]",
    args: argparse.Namespace,
) -> None:
    """The files of an evaluation: numbers first, since pictures can be made again."""
    from zoo.evaluate.pages import page
    from zoo.evaluate.restorers import telling_images
    from zoo.media import write_image

    write_file(out / "scores.csv", _csv(tables), force=args.force)
    write_file(out / "scores.json", json.dumps(_plain(tables), indent=2), force=args.force)
    worst = []
    with Progress("pictures", args.worst * len(tables), quiet=args.quiet) as bar:
        for degradation, scores in zip(degradations, tables, strict=True):
            trial.degrade_by(degradation)
            worst.append({})
            for number, image in enumerate(telling_images(scores, args.worst), start=1):
                views = worst[-1][image] = trial.views(image, scores)
                name = f"{degradation.replace('+', '_')}_{number}_{Path(image).stem}.png"
                write_image(out / "worst" / name, trial.figure(image, views), force=args.force)
                bar.update(sum(map(len, worst)), note=image)
    write_file(out / "report.html", page(tables, worst, trial.facts()), force=args.force)
    if not args.quiet and not args.json:
        some = "worst image" if args.worst == 1 else f"{args.worst} worst images"
        pictures = f" and pictures of the {some}" if args.worst else ""
        print(f"{out}: report.html, scores.csv, scores.json{pictures}")


def table(scores: "Sequence[Scores]") -> str:
    """One set of images as text: PSNR of bicubic and of every model, what each gains, SSIM; means at the end."""
    from zoo.evaluate.pages import shown
    from zoo.evaluate.protocols import recorded
    from zoo.evaluate.restorers import BICUBIC

    first = scores[0]
    models = [score for score in scores if score.model != BICUBIC]
    names = [BICUBIC if first.upscale > 1 else "input", *(score.model for score in models)]
    gains = ["gain"] if len(models) == 1 else [f"gain {n}" for n in range(1, len(models) + 1)]
    head = ["image", "size", *names, *gains, *names]
    body = []
    for place, row in enumerate(first.rows):
        rows = [score.rows[place] for score in models]
        psnr, ssim = [row.bicubic_psnr, *(r.psnr for r in rows)], [row.bicubic_ssim, *(r.ssim for r in rows)]
        body.append([row.image, f"{row.width}x{row.height}", *_cells(psnr, [r.gain for r in rows], ssim)])
    psnr, ssim = [first.bicubic_psnr, *(s.psnr for s in models)], [first.bicubic_ssim, *(s.ssim for s in models)]
    number = f"{len(first.rows)} image{'s' if len(first.rows) > 1 else ''}"
    body.append(["mean", number, *_cells(psnr, [s.gain for s in models], ssim)])
    groups = [
        ("", 2),
        (f"{first.protocol.label('PSNR')} [dB]", len(names) + len(gains)),
        (first.protocol.label("SSIM"), len(names)),
    ]
    papers = [score.paper or "" for score in models]
    after = [["paper", "", "", *papers, *[""] * (len(gains) + len(names))]] if any(papers) else []
    lines = [f"{first.data}, x{first.upscale}, input: {first.degradation}", *_aligned(head, body, after, groups)]
    for key, label in first.labels.items():
        values = [(names[0], first.also(key)[1]), *((score.model, score.also(key)[0]) for score in models)]
        told = ", ".join(f"{name} {shown(key, value)}" for name, value in values)
        lines.append(f"{label}: {f'n/a ({first.missing[key]})' if key in first.missing else told}")
    lines += [f"{score.model}, on record: {phrase}" for score in models for phrase in recorded(score.model)]
    return "\n".join(lines)


def _aligned(
    head: list[str], body: list[list[str]], after: list[list[str]], groups: Sequence[tuple[str, int]]
) -> list[str]:
    """Columns under headings that span several of them; a rule before the last line of `body`."""
    widths = [max(len(line[column]) for line in [head, *body, *after]) for column in range(len(head))]
    tops, column = [], 0
    for text, span in groups:
        room = sum(widths[column : column + span]) + 2 * (span - 1)
        if len(text) > room:  # the last column takes what the heading needs
            widths[column + span - 1] += len(text) - room
            room = len(text)
        tops.append(f"{text} ".ljust(room, "-")[:room] if text else " " * room)
        column += span
    lines = ["  ".join(tops)]
    for line in [head, *body, *after]:
        left = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        right = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    last = len(body) + 1
    return [*lines[:last], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[last:]]


def _cells(psnr: Sequence[float], gains: Sequence[float], ssim: Sequence[float | None]) -> list[str]:
    """Numbers as text; n/a where an image is too small for SSIM."""
    values = [f"{value:.2f}" for value in psnr] + [f"{gain:+.2f}" for gain in gains]
    return values + ["n/a" if value is None else f"{value:.4f}" for value in ssim]


def _setting(args: argparse.Namespace) -> dict[str, Any]:
    """Recipe, flags over it, defaults under it; "degradation" is a list."""
    recipe = getattr(args, "recipe", None)
    setting = _DEFAULTS | (_read(recipe) if recipe else {})
    flags = {key: getattr(args, key, None) for key in _KEYS if key != "degradation"}
    setting |= {key: value for key, value in flags.items() if value is not None}
    kinds = setting["degradation"]
    setting["degradation"] = [kinds] if isinstance(kinds, str) else kinds
    if args.jpeg is not None or args.noise is not None:
        noise = f"+noise{args.noise:g}" if args.noise is not None else ""
        setting["degradation"] = [f"bicubic{noise}" + (f"+jpeg{args.jpeg}" if args.jpeg is not None else "")]
    if args.command == "evaluate" and "model" not in setting:
        raise UserError("evaluate: no model; give a recipe such as photos-x2, or --model with a name of `zoo list`")
    return setting


def _read(name: str) -> dict[str, Any]:
    """The keys of an evaluation recipe.

    Raises:
        UserError: it is no such recipe, or a key is unknown or of the wrong type.
    """
    path = shipped.find_recipe(name)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(found, dict) or isinstance(found.get("model"), dict):
        raise UserError(f"{path}: no recipe for evaluation; its keys are {', '.join(_KEYS)} (see photos-x2)")
    for key, value in found.items():
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}.{nearest(str(key), _KEYS)} Known: {', '.join(_KEYS)}.")
        kind, words = _KEYS[key]
        several = key == "degradation" and isinstance(value, list) and value
        if not all(type(one) is kind for one in (value if several else [value])):
            raise UserError(f"{path}: {key} must be {words}, got {value!r}")
    return found


def _refuse_existing(out: Path, force: bool) -> None:
    if out.is_file():
        raise UserError(f"{out}: is a file; --out names a folder")
    taken = [out / name for name in ("scores.csv", "scores.json", "report.html", "worst") if (out / name).exists()]
    if taken and not force:
        raise FileExistsError(f"{taken[0]}: exists already; --force replaces it, or name another --out")


def _plain(tables: "Sequence[Sequence[Scores]]") -> list[dict[str, Any]]:
    """Scores as JSON carries them; an infinite PSNR is the text "inf"."""
    found = []
    for score in (score for scores in tables for score in scores):
        rows = [{**_numbers(row), **_also(row.also)} for row in score.rows]
        means = {k: getattr(score, k) for k in ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim", "gain")}
        means |= _also({key: score.also(key) for key in score.labels})
        facts = {k: getattr(score, k) for k in ("model", "data", "upscale", "degradation")}
        labels = {"psnr_protocol": score.protocol.label("PSNR"), "ssim_protocol": score.protocol.label("SSIM")}
        labels |= {f"{key}_protocol": label for key, label in score.labels.items()}
        told = {"paper": score.paper, "missing": score.missing}
        found.append({**facts, **labels, **told, "mean": _finite(means), "rows": [_finite(row) for row in rows]})
    return found


def _numbers(row: "Row") -> dict[str, Any]:
    return {k: v for k, v in vars(row).items() if k != "also"} | {"gain": row.gain}


def _also(values: Mapping[str, tuple[float | None, float | None]]) -> dict[str, float | None]:
    """Further measures under names of their own: of the model and of bicubic."""
    return {name: v for key, (ours, base) in values.items() for name, v in ((key, ours), (f"bicubic_{key}", base))}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _csv(tables: "Sequence[Sequence[Scores]]") -> str:
    """One line per model, degradation and image."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = ["image", "width", "height", "psnr", "ssim", "bicubic_psnr", "bicubic_ssim", "gain", "seconds"]
    further = [name for key in tables[0][0].labels for name in (key, f"bicubic_{key}")]
    writer.writerow(["model", "data", "upscale", "degradation", "protocol", *columns, *further])
    for score in (score for scores in tables for score in scores):
        for row in score.rows:
            values = _numbers(row) | _also(row.also)
            shown = [
                "" if (v := values[c]) is None else f"{v:.6f}" if isinstance(v, float) else v for c in columns + further
            ]
            writer.writerow([score.model, score.data, score.upscale, score.degradation, str(score.protocol), *shown])
    return stream.getvalue()
