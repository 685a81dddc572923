"""What a model file tells about itself: its variants as data, and what its callers must respect."""

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Variant:
    """A named size of a family.

    Args:
        config: keywords of the constructor. Sources and figures of its weights stand in checkpoints/index.yaml.
    """

    config: Mapping[str, Any]


@dataclass(frozen=True)
class Needs:
    """What a network asks of its caller.

    Args:
        upscale: output size over input size.
        in_channels: image channels.
        multiple: both sides of the input must be multiples of this, pixels.
        dtypes: names of the dtypes it is safe in.
        overlap: context that a tile needs on each side, input pixels.
        bytes_per_pixel: peak activation memory per input pixel in float32 inference, an estimate.
        passes: how often tiles are run beforehand to find means over the whole image; see pipelines/means.py.
        whole: whether tiles change what it computes, so that none are made unless the user asks for them.
        spare_bytes_per_pixel: as `bytes_per_pixel` after `network.spare_memory(True)`; 0 = it has no such way.
    """

    upscale: int
    in_channels: int
    multiple: int
    dtypes: tuple[str, ...]
    overlap: int
    bytes_per_pixel: int
    passes: int = 0
    whole: bool = False
    spare_bytes_per_pixel: int = 0


@dataclass(frozen=True)
class Entry:
    """A family.

    Args:
        network: the class.
        variants: name -> Variant.
        detect: state dict -> constructor keywords, or None when the weights are another family's.
        convert: official state dict -> ours.
        needs: network -> Needs; None for a family that restores nothing.
        hidden: constructor keywords that weights cannot tell; `zoo.load` takes these as keywords.
    """

    network: type[nn.Module]
    variants: Mapping[str, Variant]
    detect: Callable[[Mapping[str, Tensor]], dict[str, Any] | None]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    needs: Callable[[Any], Needs] | None = None
    hidden: frozenset[str] = field(default_factory=frozenset)


def check_sizes(owner: str, **sizes: int) -> None:
    """Refuse sizes below 1.

    Args:
        owner: class that the error begins with.
        **sizes: by the name of the constructor's keyword.

    Raises:
        ValueError: one is.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{owner}: {name} must be at least 1, got {size}")


def check_type(name: str, annotation: object, value: object) -> None:
    """Refuse a value that a constructor's annotation does not allow; YAML and JSON bring any.

    Args:
        name: the constructor's keyword.
        annotation: bool, int, float, str, None, a sequence of one of them, or a union; others are the constructor's own
            business.
        value: plain data; whole numbers are floats, too, infinity is none.

    Raises:
        ValueError: it is of another type.
    """
    if not _is(annotation, value):
        raise ValueError(f"{name} must be {_said(annotation)}, got {value!r}")


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}


def _is(annotation: object, value: Any) -> bool:  # noqa: ANN401
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Sequence:
        return isinstance(value, list | tuple) and all(_is(inner[0], item) for item in value)
    if origin in (typing.Union, types.UnionType):
        return any(_is(member, value) for member in inner)
    if annotation is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is annotation or annotation not in _WORDS


def _said(annotation: Any) -> str:  # noqa: ANN401
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Sequence:
        return f"a list with {_said(inner[0])} per element"
    return " or ".join(map(_said, inner)) if inner else _WORDS[annotation]


def constructor_arguments(names: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor from its `locals()`, as plain data that JSON and YAML carry."""
    plain = {k: v for k, v in names.items() if k not in ("self", "__class__")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def ratio(part: int, whole: int) -> float:
    """The factor r for which int(whole * r) is `part`; a plain quotient can truncate to one less."""
    quotient = part / whole
    return quotient if int(whole * quotient) == part else math.nextafter(quotient, math.inf)


def count(keys: Mapping[str, Any], prefix: str) -> int:
    """How many numbered children `prefix`0, `prefix`1, ... a state dict has."""
    return len({k[len(prefix) :].split(".")[0] for k in keys if k.startswith(prefix)})
