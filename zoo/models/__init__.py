"""The one table of models: name -> where it lives, and `create`, `load`, `detect`. Importing this needs no torch."""

import fnmatch
import importlib
import inspect
import logging
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import shipped
from zoo.errors import UserError, nearest
from zoo.models.hub import fetch, is_hub_id

if TYPE_CHECKING:
    from torch import Tensor, nn

    from zoo.models.entry import Entry, Needs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """A row of the table: plain data, so that listing needs no torch. A test compares it with the model file."""

    module: str
    task: str
    dtypes: tuple[str, ...]
    licence: str
    # name: upscale (0 = no image comes out), multiple, parameters
    variants: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What `zoo list` says of a variant."""

    name: str
    family: str
    task: str
    upscale: int
    multiple: int
    parameters: int
    dtypes: tuple[str, ...]
    licence: str
    shipped: bool


FAMILIES = {
    "hat": Family(
        "zoo.models.restorers.hat",
        "super-resolution",
        ("float32", "bfloat16"),
        "Apache-2.0",
        {
            "hat-tiny-x2": (2, 8, 237_558),
            "hat-tiny-x4": (4, 8, 274_550),
            "hat-s-x2": (2, 16, 9_473_471),
            "hat-s-x3": (3, 16, 9_658_111),
            "hat-s-x4": (4, 16, 9_621_183),
            "hat-x2": (2, 16, 20_624_795),
            "hat-x3": (3, 16, 20_809_435),
            "hat-x4": (4, 16, 20_772_507),
            "hat-x2-imagenet": (2, 16, 20_624_795),
            "hat-x3-imagenet": (3, 16, 20_809_435),
            "hat-x4-imagenet": (4, 16, 20_772_507),
            "hat-x4-real": (4, 16, 20_772_507),
            "hat-x4-real-sharper": (4, 16, 20_772_507),
            "hat-l-x2": (2, 16, 40_698_863),
            "hat-l-x3": (3, 16, 40_883_503),
            "hat-l-x4": (4, 16, 40_846_575),
        },
    ),
    "craft": Family(
        "zoo.models.restorers.craft",
        "super-resolution",
        ("float32", "bfloat16"),
        "Apache-2.0",
        {
            "craft-tiny-x2": (2, 16, 219_604),
            "craft-x2": (2, 16, 737_756),
            "craft-x3": (3, 16, 744_251),
            "craft-x4": (4, 16, 753_344),
        },
    ),
    "histoformer": Family(
        "zoo.models.restorers.histoformer",
        "adverse weather",
        ("float32",),
        "MIT",
        {
            "histoformer-tiny": (1, 8, 222_739),
            "histoformer-allweather": (1, 8, 16_615_100),
            "histoformer-realsnow": (1, 8, 16_615_100),
        },
    ),
    "plain-conv": Family(
        "zoo.models.restorers.plain_conv",
        "super-resolution",
        ("float32", "bfloat16", "float16"),
        "Apache-2.0",
        {"plain-conv-tiny-x2": (2, 1, 239_041)},
    ),
    "plain-features": Family(
        "zoo.models.features.plain_features",
        "features",
        ("float32",),
        "Apache-2.0",
        {"shapes-features": (0, 1, 284_152)},
    ),
    "inception": Family(
        "zoo.models.features.inception",
        "features",
        ("float32",),
        "Apache-2.0",
        {"inception-2015": (0, 1, 21_785_568)},
    ),
}


def list_models(pattern: str = "*") -> list[Facts]:
    """Every variant whose name matches the shell-like `pattern`, in the order of the table."""
    return [
        Facts(name, title, row.task, *numbers, row.dtypes, row.licence, shipped.weight_file(name) is not None)
        for title, row in FAMILIES.items()
        for name, numbers in row.variants.items()
        if fnmatch.fnmatch(name, pattern)
    ]


def lookup(family: str) -> "Entry":
    """The `ENTRY` of a family's file.

    Raises:
        UserError: no such family.
    """
    if family not in FAMILIES:
        raise UserError(f"model family {family!r} is unknown.{nearest(family, FAMILIES)} `zoo list` shows all models.")
    return importlib.import_module(FAMILIES[family].module).ENTRY


def family_of(network: "nn.Module") -> str:
    """The family whose class `network` is.

    Raises:
        UserError: the network is not one of zoo's.
    """
    for name, row in FAMILIES.items():
        if row.module == type(network).__module__:
            return name
    raise UserError(f"model: {type(network).__name__} is not a network of zoo; give a name, a file or a zoo network")


def needs(network: "nn.Module") -> "Needs":
    """What a restorer asks of its caller: channels, multiples, safe dtypes, tile overlap.

    Raises:
        UserError: the network is none of zoo's, or restores nothing.
    """
    family = family_of(network)
    found = lookup(family).needs
    if found is None:
        name = getattr(network, "variant", None) or family
        raise UserError(f"model {name!r} restores no image, it is for {FAMILIES[family].task}; see `zoo list`")
    return found(network)


def _variant(name: str) -> tuple[str, dict[str, Any]]:
    for family, row in FAMILIES.items():
        if name in row.variants:
            return family, dict(lookup(family).variants[name].config)
    known = [n for row in FAMILIES.values() for n in row.variants]
    raise UserError(f"model {name!r} is unknown.{nearest(name, known)} `zoo list` shows all models.")


def create(model: str | Mapping[str, Any]) -> "nn.Module":
    """A network with random weights, in eval mode.

    Args:
        model: a variant ("hat-s-x4"), or a mapping with `family` or `variant` and keywords of its constructor
            ({"family": "hat", "embed_dim": 48}, {"variant": "hat-s-x4", "drop_path_rate": 0.0}).

    Raises:
        UserError: an unknown name or keyword, or a value that the constructor refuses.
    """
    if not isinstance(model, str | Mapping):
        raise UserError(f"model: must be a name, or a mapping with `family` or `variant`, got {model!r}")
    keywords = {"variant": model} if isinstance(model, str) else dict(model)
    for key in ("family", "variant"):
        if not isinstance(keywords.get(key), str | None):
            raise UserError(f"model: {key} must be a name of `zoo list`, got {keywords[key]!r}")
    variant = keywords.pop("variant", None)
    if variant is not None:
        family, config = _variant(variant)
        keywords = config | keywords
        variant = variant if keywords == config else None
    elif keywords.get("family") is not None:
        family = keywords.pop("family")
    else:
        raise UserError(f"model: a mapping needs `family` or `variant`, got the keys {list(keywords)}")
    network = _build(family, keywords)
    network.variant = variant
    return network


def _build(family: str, keywords: Mapping[str, Any]) -> Any:  # noqa: ANN401 (its attributes are set)
    cls = lookup(family).network
    from zoo.models.entry import check_type  # not above: it needs torch

    known = inspect.signature(cls).parameters
    for key in keywords:
        if key not in known:
            raise UserError(f"model {family!r} has no keyword {key!r}.{nearest(str(key), known)}")
    try:
        for key, value in keywords.items():
            check_type(key, known[key].annotation, value)
        return cls(**keywords).eval()
    except (ValueError, TypeError, RuntimeError) as error:  # the last two are torch's, of sizes beyond all memory
        raise UserError(f"model {family!r}: {str(error).splitlines()[0]}") from error


def detect(state_dict: "Mapping[str, Tensor]") -> tuple[str, dict[str, Any]]:
    """The family and the constructor keywords that a bare state dict belongs to.

    Raises:
        UserError: no family knows these weights.
    """
    for family in FAMILIES:
        try:
            found = lookup(family).detect(state_dict)
        except KeyError as error:
            raise UserError(f"weights look like {family!r} but lack {error.args[0]}; fetch the file again") from error
        except (IndexError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"weights look like {family!r} but are misshaped; fetch the file again") from error
        if found is not None:
            return family, found
    first = ", ".join(list(state_dict)[:3])
    known = ", ".join(FAMILIES)
    raise UserError(f"weights of no family of zoo ({known}), with tensors named {first}, ...; see `zoo list`")


def load(source: "str | Path | Mapping[str, Tensor]", **keywords: Any) -> "nn.Module":  # noqa: ANN401
    """A network with weights, in eval mode; its architecture is read off the weights.

    Args:
        source: a file, a run folder of `zoo fit`, the name of a variant whose weights are shipped, owner/name or
            owner/name:file on the hub, or a state dict.
        **keywords: constructor keywords that weights cannot tell (such as img_range=255).

    Raises:
        FileNotFoundError: no such file, or the variant's weights are not shipped, or the hub has them not.
        UserError: unknown weights, or tensors missing, unexpected or misshaped.
    """
    from zoo.models import weights

    header = None
    if isinstance(source, Mapping):
        name, state = "state dict", weights.unwrap(source)
    else:
        path = _locate(str(source))
        name = str(source)
        state, header = weights.read_weights(path)
        if header is not None and not _describes(header):
            raise UserError(f"weights {name} describe themselves wrongly; fetch or write the file again")
    if header is not None:
        family, found, variant = header["arch"], dict(header["config"]), header.get("variant")
    else:
        try:
            family, found = detect(state)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        variant = _same_size(family, found)
    described = lookup(family)
    if header is None and variant is not None:  # what its weights cannot tell, our variant knows
        known = described.variants[variant].config.items()
        found = found | {key: value for key, value in known if key in described.hidden}
    wrong = set(keywords) - described.hidden
    if wrong:
        allowed = ", ".join(sorted(described.hidden)) or "none"
        raise UserError(f"load: {', '.join(sorted(wrong))} can be read off the weights; keywords are only: {allowed}")
    try:
        network = _build(family, found | keywords)
    except UserError as error:
        raise (
            error if keywords else UserError(f"{name}: weights fit no network: {error}; fetch the file again")
        ) from error
    network.variant = variant
    _fill(network, described.convert(state), name)
    network.sha = (header or {}).get("sha")
    level = logging.DEBUG if name == network.variant else logging.INFO  # a variant's own weights are no news
    log.log(level, "weights %s: %s", name, network.variant or f"{family}, no named size")
    return network


def _describes(header: object) -> bool:
    """Whether the header of a file holds what `weights.write_weights` puts there; anyone can write one."""
    return (
        isinstance(header, Mapping)
        and isinstance(header.get("arch"), str)
        and isinstance(header.get("config"), Mapping)
        and isinstance(header.get("variant"), str | None)
    )


def _locate(text: str) -> Path:
    path = Path(text).expanduser()
    if os.path.isdir(path):  # that of Path raises where a name is too long for a file
        path /= "weights.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"load: {path} does not exist; a run writes it with its first checkpoint")
    if os.path.isfile(path):
        return path
    if is_hub_id(text):
        return fetch(text)
    known = [n for row in FAMILIES.values() for n in row.variants]
    if text not in known:
        raise UserError(f"model {text!r} is neither a file nor a known model.{nearest(text, known)} See `zoo list`.")
    file = shipped.weight_file(text)
    if file is None:
        command = shipped.trained_by(text)
        source = shipped.index().get(text, {}).get("source", "its authors")
        remedy = (
            f"train them by `{command}` and give the run" if command else f"fetch them from {source} and give the file"
        )
        raise FileNotFoundError(f"load: the weights of {text!r} are not shipped; {remedy}")
    return file


def _same_size(family: str, found: Mapping[str, Any]) -> str | None:
    """The variant whose constructor keywords agree with what `detect` found."""
    described = lookup(family)
    defaults = {k: p.default for k, p in inspect.signature(described.network).parameters.items()}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    visible = set(found) - described.hidden
    for name, variant in described.variants.items():
        full = plain | dict(variant.config)
        if all(full[k] == found[k] for k in visible):
            return name
    return None


def _fill(network: "nn.Module", state: "Mapping[str, Tensor]", name: str) -> None:
    from zoo.models import weights

    own = network.state_dict()
    # Whole numbers are index tables and counters, which are made and not learned: some files lack or damaged them.
    state = {**state, **{key: made for key, made in own.items() if not made.is_floating_point()}}
    problems = [
        ("missing", [k for k in own if k not in state]),
        ("unexpected", [k for k in state if k not in own]),
        (
            "misshaped",
            [
                f"{k} {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
                for k in own
                if k in state and state[k].shape != own[k].shape
            ],
        ),
    ]
    said = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in problems
        if keys
    ]
    if said:
        raise UserError(f"weights {name} do not fit {type(network).__name__}: {'; '.join(said)}; fetch the file again")
    for key, tensor in state.items():
        fault = weights.fault_of(tensor, own[key].dtype)
        if fault:
            raise UserError(f"weights {name}: {key} holds {fault}; fetch the file again")
    network.load_state_dict(state)
