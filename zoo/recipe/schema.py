"""What a recipe may name: which classes may stand at which place, and which arguments they take.

A recipe from a stranger is data, never code: a class is imported only after its name was found in a table below.
"""

import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from zoo.errors import UserError, nearest
from zoo.recipe.merge import KeyPath, dotted


@dataclass(frozen=True)
class Field:
    """One place of a recipe that takes a class.

    Attributes:
        ours: our class -> the module that defines it.
        library: a module whose classes below `base` may stand here too.
        base: a class of that module.
        table: import path of a mapping, name -> class, that says instead of `base` what may stand here.
        skip: leading arguments that the task fills in; such classes stay data until the task builds them.
        words: lists the words, such as `strategy: ddp`, that Lightning takes in place of a class.
        many: a list of classes stands here.
    """

    ours: Mapping[str, str] = field(default_factory=dict)
    library: str = ""
    base: str = ""
    table: str = ""
    skip: int = 0
    words: Callable[[], list[str]] | None = None
    many: bool = False

    def names(self) -> list[str]:
        """Every short name and word that this place takes."""
        known = [*self.ours, *(self.words() if self.words else ()), *self._table()]
        if not self.base:
            return known
        module = importlib.import_module(self.library)
        base = getattr(module, self.base)
        members = ((name, getattr(module, name, None)) for name in module.__all__)
        below = [name for name, value in members if isinstance(value, type) and issubclass(value, base)]
        return [*known, *(name for name in below if name != self.base)]

    def offer(self) -> str:
        """What an error says may stand here."""
        own = ", ".join([*self.ours, *(self.words() if self.words else ()), *self._table()])
        return " or ".join(filter(None, [own, self.base and f"a class of {self.library}"]))

    def target(self, name: str) -> str | None:
        """The import path of `name`, short or dotted, or None when it is not on the list."""
        short = name.rpartition(".")[2]
        if short not in self.names():
            return None
        full = f"{self.ours.get(short, self.library)}.{short}"
        defined = self._table().get(short)
        if defined is None:
            return full if name in (short, full) else None
        own = f"{defined.__module__}.{short}"
        return own if name in (short, full, own) else None

    def _table(self) -> Mapping[str, type]:
        module, _, name = self.table.rpartition(".")
        return getattr(importlib.import_module(module), name) if module else {}


def _strategies() -> list[str]:
    return ["auto", *importlib.import_module("lightning.pytorch.strategies").StrategyRegistry.available_strategies()]


_DEGRADATIONS = Field(
    {
        **dict.fromkeys(("Bicubic", "Jpeg", "Noise"), "zoo.data.degradations"),
        "RealWorld": "zoo.data.realworld",
        **dict.fromkeys(("Rain", "Snow", "Raindrops", "Weather"), "zoo.data.weather"),
    },
    many=True,
)
_OPTIMIZER = Field(library="torch.optim", table="zoo.tasks.optimizers.OPTIMIZERS", skip=1)
_SCHEDULE = Field(library="torch.optim.lr_scheduler", table="zoo.tasks.optimizers.SCHEDULES", skip=1)
FIELDS: dict[tuple[str, ...], Field] = {  # "*" stands for one name that the user chooses
    ("model",): Field(
        {
            "RestorationTask": "zoo.tasks.restoration",
            "AdversarialTask": "zoo.tasks.adversarial",
            "AutoencoderTask": "zoo.tasks.autoencoder",
            "DiffusionTask": "zoo.tasks.diffusion",
            "DistillationTask": "zoo.tasks.distillation",
            "FeatureTask": "zoo.tasks.features",
        }
    ),
    ("model", "init_args", "objectives"): Field(
        dict.fromkeys(("L1", "MSE", "Charbonnier", "FFT", "Wavelet", "Pearson", "Perceptual"), "zoo.tasks.objectives"),
        many=True,
    ),
    ("model", "init_args", "optimizer"): _OPTIMIZER,
    ("model", "init_args", "schedule"): _SCHEDULE,
    ("model", "init_args", "discriminator_optimizer"): _OPTIMIZER,
    ("model", "init_args", "discriminator_schedule"): _SCHEDULE,
    ("data",): Field({"RestorationData": "zoo.data.restoration", "GenerationData": "zoo.data.generation"}),
    ("data", "init_args", "degradation"): _DEGRADATIONS,
    ("data", "init_args", "validation", "*", "degradation"): _DEGRADATIONS,
    ("trainer", "callbacks"): Field(
        {"EMA": "zoo.tasks.ema", "Previews": "zoo.tasks.previews"}, "lightning.pytorch.callbacks", "Callback", many=True
    ),
    ("trainer", "strategy"): Field(library="lightning.pytorch.strategies", base="Strategy", words=_strategies),
    ("trainer", "profiler"): Field(
        library="lightning.pytorch.profilers", base="Profiler", words=lambda: ["simple", "advanced", "pytorch", "xla"]
    ),
    ("trainer", "logger"): Field(library="lightning.pytorch.loggers", base="Logger", words=list, many=True),
}


@dataclass(frozen=True)
class Argument:
    """A plain value that a recipe hands to a class: its key path, the annotation it must meet, and itself."""

    path: KeyPath
    annotation: object
    value: object


@dataclass
class Walk:
    """One pass over a resolved recipe: refuses what it may not name and collects the values to be type-checked.

    Attributes:
        where: key path -> "FILE:LINE".
        trust: let every place name any class.
        arguments: plain values met on the way.
        classes: import paths that Lightning's parser will need.
    """

    where: Callable[[KeyPath], str]
    trust: bool = False
    arguments: list[Argument] = field(default_factory=list)
    classes: set[str] = field(default_factory=set)

    def recipe(self, config: Mapping[str, Any], trainer: type) -> dict[str, Any]:
        """The parts for Lightning's parser, with every class under the path where it is defined.

        Raises:
            UserError: a place holds a class or a key that it may not hold, or lacks one that it needs.
        """
        parts: dict[str, Any] = {}
        for name in ("model", "data"):
            if config.get(name) is None:
                raise self._error((), f"the recipe has no `{name}:`; add it or take it from a _base")
            parts[name] = self._value((name,), config[name], None)
        given = {} if config.get("trainer") is None else config["trainer"]
        if not isinstance(given, dict):
            raise self._error(("trainer",), "trainer must be a mapping of Trainer arguments")
        parts["trainer"] = self._keywords(("trainer",), given, trainer, 0)
        return parts

    def _error(self, path: KeyPath, text: str) -> UserError:
        return UserError(f"{self.where(path)}: {text}")

    def _value(self, path: KeyPath, value: object, annotation: object, part: bool = False) -> object:
        """One value, with the classes inside it checked and written out; a `part` has the annotation of its whole."""
        place, kind = _place(path), _kind(annotation)
        if value == "???":
            raise self._error(path, f"{dotted(path)} is not set; give it as {dotted(path)}=VALUE")
        if place:
            value = self._at_place(path, value, place)
        if isinstance(value, dict) and "class_path" in value:
            return self._spec(path, value, place)
        if kind == "code" and value is not None and not self.trust:
            raise self._error(path, f"{dotted(path)} takes code, which a recipe may not name; --trust lifts this")
        if isinstance(value, str) and not self.trust:
            self._text(path, value, annotation)
        record = _record(annotation)
        if record and isinstance(value, dict):
            self.classes.add(f"{record.__module__}.{record.__qualname__}")
            return self._keywords(path, value, record, 0)
        inner = _inside(annotation, type(value))
        below, alone = (annotation, True) if inner is None else (inner, part)
        if isinstance(value, dict):
            value = {key: self._value((*path, key), item, below, alone) for key, item in value.items()}
        elif isinstance(value, list):
            value = [self._value((*path, number), item, below, alone) for number, item in enumerate(value)]
        if inner is None and annotation not in (None, Any) and kind != "code" and not place and not part:
            self.arguments.append(Argument(path, annotation, value))
        return value

    def _text(self, path: KeyPath, text: str, annotation: object) -> None:
        """Refuses a text that Lightning's parser would import, or read as YAML in which a class is named."""
        if _kind(annotation) == "class" and "." in text and all(name.isidentifier() for name in text.split(".")):
            raise self._error(path, _refusal(path, text, None))
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # such as the date 2000-13-13
            return
        if isinstance(data, dict | list):
            Walk(self.where)._value(path, data, annotation, part=True)

    def _at_place(self, path: KeyPath, value: object, place: Field) -> object:
        """A value where classes belong: a bare name becomes a mapping, and what can be no class is refused."""
        whole = value is None or (place.many and isinstance(value, list))
        if place.words is not None:
            whole = whole or isinstance(value, bool) or value in place.words()
        if isinstance(value, str) and not whole:
            return {"class_path": value}
        if (isinstance(value, dict) and "class_path" in value) or (whole and isinstance(path[-1], str)):
            return value
        raise self._error(path, f"{dotted(path)} needs a class_path: {place.offer()}")

    def _spec(self, path: KeyPath, spec: dict[str, Any], place: Field | None) -> dict[str, Any]:
        """A mapping {class_path, init_args}: the class must be on the list of its place."""
        for key in spec:
            if key not in ("class_path", "init_args"):
                raise self._error((*path, key), f"{dotted(path)} takes class_path and init_args, not {key!r}")
        name, arguments = spec["class_path"], spec.get("init_args") or {}
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise self._error(path, f"{dotted(path)} needs a class name and a mapping of init_args")
        target = place.target(name) if place else None
        if target is None and not self.trust:
            raise self._error((*path, "class_path"), _refusal(path, name, place))
        known = self._load((*path, "class_path"), target or name)
        skip = place.skip if place else 0
        filled = self._keywords((*path, "init_args"), arguments, known, skip)
        defined = f"{known.__module__}.{known.__qualname__}"
        self.classes.add(defined)
        return {"class_path": defined, "init_args": filled}

    def _keywords(self, path: KeyPath, given: dict[str, Any], known: type, skip: int) -> dict[str, Any]:
        """The arguments of one class: each must be in its signature, and none that it needs may lack."""
        parameters = list(inspect.signature(known).parameters.values())
        named = {p.name: p for p in parameters[skip:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        hints = _hints(known)
        if any(p.kind is p.VAR_KEYWORD for p in parameters) and not given.keys() <= named.keys():
            hints = _followed(known) | hints
        hints = {name: _assumed(p.default) for name, p in named.items()} | hints
        hidden = {p.name for p in parameters if p.name not in named}
        accepted = dict.fromkeys([*named, *(name for name in hints if name not in hidden)])
        for key in given:
            if key not in accepted:
                hint = nearest(key, accepted) or f" It takes {', '.join(accepted)}."
                raise self._error((*path, key), f"{known.__name__} takes no {key!r}.{hint}")
        owner = path[:-1] if path[-1] == "init_args" else path
        for name, parameter in named.items():
            if parameter.default is parameter.empty and name not in given:
                raise self._error(owner, f"{known.__name__} needs {name!r}; add it to {dotted(path)}")
        return {key: self._value((*path, key), value, hints.get(key)) for key, value in given.items()}

    def _load(self, path: KeyPath, target: str) -> type:
        module, _, name = target.rpartition(".")
        try:
            known = getattr(importlib.import_module(module), name) if module else None
        except (ImportError, AttributeError) as error:
            raise self._error(path, f"class {target!r} cannot be imported ({error})") from error
        if not isinstance(known, type):
            raise self._error(path, f"{target!r} is no class; give a dotted path such as package.module.Class")
        return known


def _place(path: KeyPath) -> Field | None:
    """The row of the table that `path`, or the list it is an element of, belongs to."""
    names = [key for key in path if isinstance(key, str)]
    for pattern, place in FIELDS.items():
        if len(pattern) == len(names) and all(p in ("*", n) for p, n in zip(pattern, names, strict=True)):
            return place
    return None


def _refusal(path: KeyPath, name: str, place: Field | None) -> str:
    """Why `name` may not stand at `path`, with the nearest name that may."""
    if place and "." not in name:
        hint = nearest(name, place.names()) or f" It takes {place.offer()}."
        return f"{dotted(path)} knows no class {name!r}.{hint}"
    return f"{dotted(path)} may not name the class {name!r}; --trust lifts this for a recipe that you trust"


def _hints(known: type) -> dict[str, Any]:
    """The annotations of a constructor."""
    try:
        hints = typing.get_type_hints(known.__init__)
    except (NameError, TypeError):
        return _followed(known)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _followed(known: type) -> dict[str, Any]:
    """The annotations that Lightning's parser finds in the source, also of what a constructor hands on as **kwargs.

    It takes seconds where the way is long, so only what `_hints` cannot tell is asked here.
    """
    from jsonargparse._parameter_resolvers import get_signature_parameters

    found = get_signature_parameters(known)
    return {p.name: _assumed(p.default) if p.annotation is inspect.Parameter.empty else p.annotation for p in found}


def _assumed(default: object) -> object:
    """The annotation that Lightning's parser goes by where there is none."""
    return typing.Union[type(default), Any]  # noqa: UP007 (not every type takes |)


def _members(annotation: object) -> tuple[object, ...]:
    """The alternatives of an annotation."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _record(annotation: object) -> type | None:
    """The dataclass that a mapping given for the annotation must describe."""
    return next((m for m in _members(annotation) if isinstance(m, type) and is_dataclass(m)), None)


def _inside(annotation: object, container: type) -> object:
    """What the annotation says of the elements of a list or of the values of a mapping; None when nothing."""
    found = [m for m in _members(annotation) if container in (list, dict) and typing.get_origin(m) is container]
    return typing.get_args(found[0])[-1] if len(found) == 1 else None


def _leaves(annotation: object) -> Iterator[object]:
    """The innermost types of an annotation, those of the fields of its dataclasses among them."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        yield str
    elif origin in (Callable, type):
        yield Callable
    elif inner:
        for part in inner:
            yield from _leaves(part)
    else:
        yield annotation
        if isinstance(annotation, type) and is_dataclass(annotation):
            for part in _hints(annotation).values():
                yield from _leaves(part)


_CODE = (Callable, typing.Callable, type, types.ModuleType, types.UnionType, types.GenericAlias)  # texts name these
_PLAIN = (int, float, str, bool, list, tuple, dict, set, Path, types.NoneType, Ellipsis)


def _kind(annotation: object) -> str:
    """Of an annotation: `plain` data, a `class` to be built, `code` to be called, or `unknown`."""
    leaves = [leaf for leaf in _leaves(annotation) if leaf not in _PLAIN and not is_dataclass(leaf)]
    if any(leaf in _CODE for leaf in leaves):
        return "code"
    if any(leaf not in (None, Any, object) for leaf in leaves):
        return "class"
    return "unknown" if leaves else "plain"
