"""Finds recipes/ and checkpoints/ in a checkout and inside an installed wheel."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from zoo.errors import UserError, nearest


@cache
def folder(name: str) -> Path:
    """The folder `recipes` or `checkpoints`: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: the installation carries no such folder.
    """
    package = Path(__file__).resolve().parent
    for place in (package / name, package.parent / name):
        if place.is_dir():
            return place
    raise FileNotFoundError(f"shipped: this installation has no folder {name!r}; install zoo again from its checkout")


def recipes() -> dict[str, Path]:
    """Every shipped recipe by name, such as "train/hat-tiny-x2"; bases are left out."""
    top = folder("recipes")
    files = sorted(p for p in top.rglob("*.yaml") if "_base" not in p.relative_to(top).parts)
    return {p.relative_to(top).with_suffix("").as_posix(): p for p in files}


def find_recipe(text: str) -> Path:
    """The recipe file that `text` means: a path, or the name of a shipped recipe with or without its folder.

    Raises:
        UserError: there is no such file, or the short name stands for several recipes.
    """
    path = Path(text).expanduser()
    if path.is_file():
        return path
    known = recipes()
    name = text.removesuffix(".yaml").removeprefix("recipes/")
    if name in known:
        return known[name]
    short = [full for full in known if full.rsplit("/", 1)[-1] == name]
    if len(short) == 1:
        return known[short[0]]
    if short:
        raise UserError(f"recipe {text!r} could be {' or '.join(short)}; give the name with its folder")
    hint = nearest(name, [*known, *(full.rsplit("/", 1)[-1] for full in known)])
    raise UserError(f"recipe {text!r} is neither a file nor a shipped recipe.{hint} `zoo recipes` lists them.")


@cache
def index() -> dict[str, dict[str, Any]]:
    """checkpoints/index.yaml: variant -> source, file, sha256, licence, recipe and figures."""
    path = folder("checkpoints") / "index.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def weight_file(variant: str) -> Path | None:
    """The shipped weight file of `variant`, or None when its weights must be fetched by hand."""
    name = index().get(variant, {}).get("file")
    return folder("checkpoints") / name if name else None


def trained_by(variant: str) -> str | None:
    """The command that trains the weights of `variant`, where they are our own."""
    source = index().get(variant, {}).get("source", "")
    return source if source.startswith("zoo fit") else None
