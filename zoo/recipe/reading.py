"""OmegaConf reads a recipe, merges its base, applies overrides and resolves interpolations; torch is not imported."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo import shipped
from zoo.errors import UserError, nearest
from zoo.recipe.merge import Draft, KeyPath, dotted

TOP_KEYS = ("seed_everything", "model", "data", "trainer", "tracking", "checkpoint_every", "vars", "smoke")
_OURS = ("tracking", "checkpoint_every", "vars", "smoke")
_PLACE = ("accelerator", "devices", "num_nodes", "strategy", "logger", "profiler", "enable_progress_bar")


@dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
        path: the file it was read from.
        text: that file as it stands, without base and overrides.
        config: plain data with base and overrides merged and every ${} resolved.
        hash: sha256 of what decides the result: the config without smoke, tracking, checkpoints and devices.
        overrides: the `key=value` texts that were applied.
        added: those of them that set a key which no file mentions.
        places: key path -> "FILE:LINE" or the override that set it.
    """

    path: Path
    text: str
    config: dict[str, Any]
    hash: str
    overrides: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    places: dict[KeyPath, str] = field(default_factory=dict, repr=False)

    def where(self, path: KeyPath) -> str:
        """The line that set `path`, or that of the nearest key above it."""
        return Draft(places=self.places).where(path)


def resolve(source: str | Path, overrides: Sequence[str] = (), *, smoke: bool = False) -> Recipe:
    """A recipe with its base merged, its overrides applied and its interpolations resolved; torch is not imported.

    Args:
        source: a file, or the name of a shipped recipe.
        overrides: texts such as "trainer.max_steps=3" or "data.init_args.stages.0.batch_size=2"; values are YAML.
        smoke: lay the `smoke:` block over the rest, below the overrides.

    Raises:
        UserError: a mistake in the file or in an override, as one sentence that starts with its line.
    """
    path = shipped.find_recipe(str(source))
    draft = _read(path, ())
    first = [text for text in overrides if text.startswith("smoke.")]
    for text in first:
        _override(draft, text)
    block = draft.config.get("smoke") or {}
    if not isinstance(block, dict):
        raise UserError(f"{draft.where(('smoke',))}: smoke must be a mapping of what a trial changes")
    if smoke:
        draft.config.pop("smoke", None)
        draft.lay(Draft(block, {key[1:]: line for key, line in draft.places.items() if key[:1] == ("smoke",)}))
    for text in overrides:
        if text not in first:
            _override(draft, text)
    for key in draft.config:
        if key not in TOP_KEYS and isinstance(draft.config.get("model"), str):
            raise UserError(f"{_shown(path)}: this is no recipe for training; measure with `zoo evaluate {source}`")
        if key not in TOP_KEYS:
            hint = nearest(key, TOP_KEYS) or f" It knows {', '.join(TOP_KEYS)}."
            raise UserError(f"{draft.where((key,))}: a recipe has no key {key!r}.{hint}")
    config = _interpolate(draft)
    text = path.read_text(encoding="utf-8")
    return Recipe(path, text, config, _hash(config), tuple(overrides), tuple(draft.added), draft.places)


def listing(recipe: Recipe) -> str:
    """The resolved recipe as YAML; the comment behind each line is the place that set it."""
    text = yaml.safe_dump(recipe.config, sort_keys=False, allow_unicode=True, width=10**6)
    starts: dict[KeyPath, str] = {}
    _mark(yaml.compose(text, Loader=yaml.SafeLoader), "", (), starts)
    places = {place: recipe.where(path) for path, place in starts.items()}  # the last path of a line is the innermost
    lines = text.splitlines()
    width = min(60, max(map(len, lines)))
    rows = [f"{line:{width}}  # {places[f':{n}']}" if f":{n}" in places else line for n, line in enumerate(lines, 1)]
    return "\n".join(rows)


def _read(path: Path, above: tuple[Path, ...]) -> Draft:
    """One file laid over its base."""
    if path.resolve() in above:
        chain = " -> ".join(p.name for p in (*above, path))
        raise UserError(f"{_shown(path)}: the _base files name each other in a circle ({chain}); break it")
    draft = Draft()
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{_shown(path)}:1: a recipe must be a mapping of keys such as model, data and trainer")
        _mark(node, _shown(path), (), draft.places)
        draft.config = _plain(OmegaConf.create(text))
    except UnicodeDecodeError as error:
        raise UserError(f"{_shown(path)}: this is no text file; a recipe is YAML in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; inside [] and {} put ${...} in quotes" if "${" in "".join(text.splitlines()[line - 1 : line]) else ""
        raise UserError(f"{_shown(path)}:{line}: not valid YAML: {error.problem or error.context}{hint}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{_shown(path)}: not valid YAML: {_first(error)}") from error
    except OmegaConfBaseException as error:
        raise _unresolved(draft, error) from error
    except RecursionError as error:
        raise UserError(f"{_shown(path)}: the YAML refers to itself; write it without the circle") from error
    base = draft.config.pop("_base", None)
    under = Draft()
    if base is not None:
        at = draft.where(("_base",))
        if not isinstance(base, str):
            raise UserError(f"{at}: _base must name one file, got {base!r}")
        file = Path(os.path.normpath(path.parent / base))
        if not file.is_file():
            raise UserError(f"{at}: _base names {base!r}, but there is no file {file}")
        under = _read(file, (*above, path.resolve()))
    under.lay(draft)
    return under


def _shown(path: Path) -> str:
    """The path as errors name it: relative when it lies below the working folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _mark(node: yaml.Node, file: str, path: KeyPath, places: dict[KeyPath, str]) -> None:
    """Notes the line of every key and list element below `node`."""
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(number, value, value) for number, value in enumerate(node.value)]
    else:
        return
    places.setdefault(path, f"{file}:{node.start_mark.line + 1}")
    for name, key, value in children:
        places[(*path, name)] = f"{file}:{key.start_mark.line + 1}"
        _mark(value, file, (*path, name), places)


def _override(draft: Draft, text: str) -> None:
    """Applies one `key=value` to the draft."""
    key, sign, value = text.partition("=")
    label = f"override {text!r}"
    if not sign or not key.strip():
        raise UserError(f"{label}: write it as key=value, such as trainer.max_steps=100")
    try:
        data = _plain(OmegaConf.from_dotlist([f"value={value}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{label}: the value is not valid YAML; quote it") from error
    top = key.strip().split(".")[0].removesuffix("+")
    if top not in TOP_KEYS:
        raise UserError(f"{label}: a recipe has no {top!r}.{nearest(top, TOP_KEYS)}")
    draft.override(key.strip(), data, label)


def _interpolate(draft: Draft) -> dict[str, Any]:
    """The config with every ${} resolved."""
    try:
        return _plain(OmegaConf.create(draft.config), resolve=True)
    except OmegaConfBaseException as error:
        raise _unresolved(draft, error) from error


def _plain(config: DictConfig | ListConfig, *, resolve: bool = False) -> dict[Any, Any]:
    """A mapping as dicts and lists; YAML allows keys that are no text, which `Draft.lay` refuses."""
    data = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(data, dict)
    return data


def _unresolved(draft: Draft, error: OmegaConfBaseException) -> UserError:
    """What a bad interpolation says."""
    key = tuple(int(k) if k.isdecimal() else k for k in re.findall(r"[^.\[\]]+", error.full_key or ""))
    text = _first(error)
    if found := re.search(r"Interpolation key '(.+?)' not found", text):
        known = {dotted(path) for path in draft.places}
        text = f"${{{found[1]}}} names no key of the recipe.{nearest(found[1], known)}"
    else:
        text = f"the interpolation cannot be resolved: {text}"
    return UserError(f"{draft.where(key)}: {dotted(key)}: {text}")


def _first(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n", 1)[0]


def _hash(config: dict[str, Any]) -> str:
    """sha256 over what decides the result, so that a run may go on elsewhere."""
    kept = {key: value for key, value in config.items() if key not in _OURS}
    if isinstance(config.get("trainer"), dict):
        kept["trainer"] = {k: v for k, v in config["trainer"].items() if k not in _PLACE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
