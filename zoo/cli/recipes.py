"""`zoo recipes`, `zoo show RECIPE` or `zoo show --data NAME`, and `zoo check RECIPE`."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from zoo.cli.options import add, open_working_folder
from zoo.errors import UserError

# What `zoo show --data` paints; zoo.data.sheets has the steps, which a test compares.
SHEETS = ("shapes", "bicubic", "jpeg", "noise", "realworld", "rain", "snow", "raindrops", "weather", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command that `parser` is for."""
    command = parser.get_default("command")
    add(parser, "json")
    if command == "recipes":
        return
    parser.add_argument(
        "recipe", nargs="?" if command == "show" else None, help="a YAML file, or a name that `zoo recipes` lists"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as trainer.max_steps=1000")
    add(parser, "trust")
    if command == "show":
        parser.add_argument("--smoke", action="store_true", help="with what `zoo check` changes")
        parser.add_argument(
            "--data", choices=SHEETS, metavar="NAME", help=f"a sheet of samples: {', '.join(SHEETS)} (all of a recipe)"
        )
        parser.add_argument("--num", type=int, metavar="N", help="samples on the sheet (8; of shapes 24)")
        parser.add_argument("--size", type=int, metavar="N", help="side of the samples in pixels (192; of shapes 64)")
        parser.set_defaults(out="outputs")
        add(parser, "seed", "out", "force")


def run(args: argparse.Namespace) -> int:
    """Runs the one of the three commands that was called."""
    if args.command != "recipes":
        open_working_folder(args)
    return {"recipes": _list, "show": _show, "check": _check}[args.command](args)


def _list(args: argparse.Namespace) -> int:
    """Every shipped recipe with the first line of its comment."""
    from zoo import shipped

    rows = {}
    for name, path in shipped.recipes().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0]
        rows[name] = first.removeprefix("#").strip() if first.startswith("#") else ""
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(map(len, rows), default=0)
    for name, text in rows.items():
        print(f"{name:{width}}  {text}")
    return 0


def _show(args: argparse.Namespace) -> int:
    """The resolved recipe as YAML, with the line that set each value; or a sheet of data."""
    if args.data == "shapes" and args.recipe is None:
        return _show_shapes(args)
    if args.data is not None:
        return _show_degradation(args)
    if args.recipe is None:
        raise UserError("show: name a recipe, or data by --data shapes")
    from zoo.recipe import listing, resolve, validate

    recipe = resolve(args.recipe, args.overrides, smoke=args.smoke)
    if recipe.added:  # only signatures can tell whether a key exists that no file mentions
        validate(recipe, trust=args.trust)
    if args.json:
        print(json.dumps({"path": str(recipe.path), "hash": recipe.hash, "config": recipe.config}, indent=2))
        return 0
    print(f"# {recipe.path}\n# hash {recipe.hash}\n{listing(recipe)}")
    return 0


def _show_shapes(args: argparse.Namespace) -> int:
    """A contact sheet of shapes world, training samples and captions that training never sees."""
    num, size = _counts(args, 24, 64)
    from zoo import media
    from zoo.data.shapes import draw, render

    seed, unseen = args.seed or 0, max(1, num // 4)
    samples = [draw(seed, n) for n in range(num - unseen)]
    samples += [draw(seed, n, held_out=True) for n in range(unseen)]
    images = [render(sample.scene, sample.places, size) for sample in samples]
    labels = [sample.caption for sample in samples]
    labels[-unseen:] = [f"[unseen] {label}" for label in labels[-unseen:]]
    sheet = media.grid(images, labels, columns=min(8, num), title=f"shapes world, seed {seed}")
    path = media.write_image(Path(args.out) / "shapes.png", sheet, force=args.force)
    print(json.dumps({"file": str(path), "captions": labels}) if args.json else f"{path}: {len(samples)} samples")
    return 0


def _show_degradation(args: argparse.Namespace) -> int:
    """A contact sheet of clean and degraded crops, by a recipe's settings or by the defaults of one step."""
    num, size = _counts(args, 8, 192)
    from zoo import media
    from zoo.data.restoration import RestorationData
    from zoo.data.sheets import default_data, sheet

    if args.recipe is None:
        data = default_data(args.data, args.seed or 0)
    else:
        from zoo.recipe import resolve, sketch

        seed = [] if args.seed is None else [f"data.init_args.seed={args.seed}"]
        data = sketch(resolve(args.recipe, [*args.overrides, *seed], smoke=args.smoke), trust=args.trust).data
        if not isinstance(data, RestorationData):
            raise UserError(f"show: {args.recipe} trains no restorer; --data {args.data} needs one that does")
    picture, captions = sheet(data, args.data, num, size)
    path = media.write_image(Path(args.out) / f"{args.data}.png", picture, force=args.force)
    print(json.dumps({"file": str(path), "captions": captions}) if args.json else f"{path}: {num} samples")
    return 0


def _counts(args: argparse.Namespace, num: int, size: int) -> tuple[int, int]:
    """--num and --size, or what is usual."""
    num, size = args.num or num, args.size or size
    if not 1 <= num <= 400 or not 32 <= size <= 512:
        raise UserError(f"show: --num must be 1 to 400 and --size 32 to 512, got {num} and {size}")
    return num, size


def _check(args: argparse.Namespace) -> int:
    """Parses, builds on the meta device, trains two steps of the smoke version."""
    from zoo.recipe import check, resolve

    recipe = resolve(args.recipe, args.overrides)
    report = check(recipe, trust=args.trust)
    if args.json:
        print(json.dumps({"path": str(recipe.path), "hash": recipe.hash, **asdict(report)}))
        return 0
    print(
        f"{args.recipe}: fine. {report.parameters / 1e6:.3f} M parameters at full size; "
        f"{report.steps} smoke steps in {report.seconds:.1f} s"
    )
    return 0
