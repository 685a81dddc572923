"""What plug-ins share: how a method comes onto a denoiser, what it does there, and how it goes off again bit by bit."""

import functools
import importlib
import inspect
import json
import logging
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from safetensors.torch import save
from torch import Tensor, nn

from zoo.errors import UserError, nearest
from zoo.files import write_file, write_folder
from zoo.models.hub import fetch, is_hub_id
from zoo.models.plugins import METHODS
from zoo.models.plugins.hosts import Host, Layout, find_host
from zoo.models.weights import read_weights

logger = logging.getLogger(__name__)
CONFIG, FILE = "config.json", "diffusion_pytorch_model.safetensors"  # as LinFusion's authors publish, and diffusers
RUN = "plugin"  # in a run folder
Weights = str | Path | Mapping[str, Tensor] | None


class Plugin(ABC):
    """A method with its settings, on the layers of one denoiser.

    Layers hold it as their attribute `plugin` and its parameters as children: processors hold nothing, since diffusers
    makes them anew from their class.

    Args:
        config: the settings, a dataclass.
        host: what the denoiser is.
        denoiser: the network.

    Attributes:
        layers: names and modules of the attention that it replaces.
        layout: where the picture lies in the call that is running.
    """

    title: ClassVar[str]

    def __init__(self, config: Any, host: Host, denoiser: nn.Module) -> None:  # noqa: ANN401 (one class a method)
        self.config, self.host = config, host
        self.layers = host.layers(denoiser)
        self.layout: Layout | None = None

    @abstractmethod
    def additions(self, name: str, attention: Any) -> dict[str, nn.Module | nn.Parameter]:  # noqa: ANN401
        """New children of one layer, on its device and in its dtype."""

    @abstractmethod
    def attend(self, attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401
        """The attention of one layer, b heads n d."""

    def project(self, attention: Any, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
        """Queries of the tokens, keys and values of the context, heads side by side."""
        if getattr(attention, "fused_projections", False) and hasattr(attention, "to_qkv"):
            return attention.to_qkv(tokens).chunk(3, dim=-1)
        return attention.to_q(tokens), attention.to_k(context), attention.to_v(context)

    def begin(self, denoiser: Any) -> None:  # noqa: ANN401, B027 (most methods need nothing)
        """Change what lies outside of the layers."""

    def end(self, denoiser: Any) -> None:  # noqa: ANN401, B027
        """Bring that back."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """What it trains and stores, by the names of the official files."""

    @abstractmethod
    def align(self) -> list[str]:
        """Layers whose outputs a student has to match."""

    def fresh(self) -> dict[str, Tensor] | None:
        """What it begins with where no weights are given; None = as it was added."""
        return None

    def described(self) -> dict[str, Any]:
        """What config.json says beside the settings."""
        return {}


class _Before:
    """Tells the plug-in where the picture lies in each call. An object: closures are not copied with a network."""

    def __init__(self, plugin: Plugin, names: tuple[str, ...]) -> None:
        self.plugin, self.names = plugin, names

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        self.plugin.layout = self.plugin.host.layout(denoiser, given)


@dataclass
class Summary:
    """What a plug-in has changed.

    Attributes:
        method: settings of the plug-in.
        host: what the denoiser is.
        layers: layers that it computes now, of those that it was applied to.
        added: numbers in new parameters.
        replaced: numbers in parameters of the denoiser that weights were loaded over.
    """

    method: str
    host: str
    layers: tuple[int, int]
    added: int
    replaced: int

    def __repr__(self) -> str:
        """One line for people."""
        active, total = self.layers
        lost = f" of {total}, whose processors were replaced since" if active < total else ""
        return (
            f"{self.method} on {self.host}: {active}{lost} layers, {self.added:,} parameters added, "
            f"{self.replaced:,} replaced"
        )


class Handle:
    """A plug-in that was applied, and what brings the denoiser back.

    A deep copy of the denoiser carries a copy of it, `copy.zoo`.

    Args:
        denoiser: the network that carries it.
        plugin: the method.
    """

    def __init__(self, denoiser: nn.Module, plugin: Plugin) -> None:
        self.denoiser, self.plugin = denoiser, plugin
        self._processors: dict[str, Any] = {}
        self._added: dict[str, list[str]] = {}
        self._originals: dict[str, Tensor] = {}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights by their official names; those of the denoiser that they replace are kept on the CPU.

        Raises:
            UserError: they are not of this method on this denoiser; nothing is changed then.
        """
        own = self.plugin.parameters()
        _check(weights, own, self.plugin)
        self.keep()
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(weights[key])
        self.plugin.host.fuse_again(self.plugin.layers)

    def keep(self) -> None:
        """Keep the denoiser's own weights on the CPU, before others or training replace them."""
        new = {id(parameter) for parameter in self._new()}
        for key, parameter in self.plugin.parameters().items():
            if key not in self._originals and id(parameter) not in new:
                self._originals[key] = parameter.detach().to("cpu", copy=True)

    def remove(self) -> None:
        """Bring back what was there before: the same processors, the same bits.

        Raises:
            UserError: it was removed already.
        """
        if getattr(self.denoiser, "zoo", None) is not self:
            raise UserError(f"{self.plugin.title} is not on this denoiser any more; it was removed before")
        parameters = self.plugin.parameters()
        with torch.no_grad():
            for key, original in self._originals.items():
                parameters[key].copy_(original)
        for name, attention in self.plugin.layers.items():
            if isinstance(attention.processor, self.plugin.host.processors):
                attention.set_processor(self._processors[name])
            for child in self._added[name]:
                delattr(attention, child)
            del attention.plugin
        self.plugin.host.fuse_again(self.plugin.layers)
        hooks = self.denoiser._forward_pre_hooks
        for number in [number for number, hook in hooks.items() if isinstance(hook, _Before)]:
            del hooks[number]
            self.denoiser._forward_pre_hooks_with_kwargs.pop(number, None)
        self.plugin.end(self.denoiser)
        vars(self.denoiser).pop("save_pretrained", None)
        del self.denoiser.zoo

    def summary(self) -> Summary:
        """What it has changed."""
        ours = [isinstance(module.processor, self.plugin.host.processors) for module in self.plugin.layers.values()]
        return Summary(
            repr(self.plugin.config),
            self.plugin.host.title,
            (sum(ours), len(ours)),
            sum(parameter.numel() for parameter in self._new()),
            sum(tensor.numel() for tensor in self._originals.values()),
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the plug-in's own tensors and config.json in place of what lies there; `zoo.apply` takes the folder."""
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.plugin.parameters().items()}
        said = {"_class_name": self.plugin.title, **asdict(self.plugin.config), **self.plugin.described()}

        def write(part: Path) -> None:
            write_file(part / CONFIG, json.dumps(said, indent=2) + "\n")
            write_file(part / FILE, save(tensors, metadata={"format": "pt", "zoo": json.dumps(said)}))

        return write_folder(folder, write)

    def _mount(self) -> None:
        additions = {name: self.plugin.additions(name, layer) for name, layer in self.plugin.layers.items()}
        for name, attention in self.plugin.layers.items():
            self._processors[name] = attention.processor
            self._added[name] = list(additions[name])
            for child, value in additions[name].items():
                setattr(attention, child, value)
            attention.plugin = self.plugin
            attention.set_processor(self.plugin.host.processor(attention))
        names = tuple(inspect.signature(self.denoiser.forward).parameters)
        self.denoiser.register_forward_pre_hook(_Before(self.plugin, names), with_kwargs=True)
        if isinstance(self.denoiser, ModelMixin):
            self.denoiser.save_pretrained = types.MethodType(_save_with_a_warning, self.denoiser)
        self.plugin.begin(self.denoiser)
        self.denoiser.zoo = self

    def _new(self) -> Iterator[nn.Parameter]:
        for name, children in self._added.items():
            for child in children:
                value = getattr(self.plugin.layers[name], child)
                yield from value.parameters() if isinstance(value, nn.Module) else [value]


@functools.wraps(ModelMixin.save_pretrained)  # pipelines look at what it takes
def _save_with_a_warning(denoiser: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    logger.warning(
        "%s is on this denoiser: what is saved now comes back without it. Keep it by handle.save_pretrained(folder) "
        "or call handle.remove() first",
        denoiser.zoo.plugin.title,
    )
    type(denoiser).save_pretrained(denoiser, *args, **kwargs)


def apply(target: Any, plugin: Any, weights: Weights = None) -> Handle:  # noqa: ANN401
    """Put a method onto a denoiser: its attention becomes linear, or local.

    Apply before LoRA, IP-Adapter, offloading and compilation; LoRA may also come first.

    Args:
        target: a pipeline of diffusers, or its UNet or transformer.
        plugin: a name such as "linfusion" or "clear-16-down4", alone or in a mapping with settings that differ from its
            own, settings such as `LinFusionConfig(...)`, or a folder that `Handle.save_pretrained` or `zoo fit` wrote,
            which holds its weights too.
        weights: a folder, a file, owner/name or owner/name:file on the hub, or tensors by the official names; None =
            those of the folder, or none: then it begins as its settings say and needs training.

    Returns:
        The handle, whose `remove` brings the denoiser back bit by bit.

    Raises:
        FileNotFoundError: no such folder or file.
        UserError: the method does not fit the denoiser, the weights do not fit both, another one is on it, or it is
            offloaded already. Nothing is changed then.
    """
    denoiser = denoiser_of(target)
    _check_free(denoiser)
    config, place = settings_of(plugin)
    tensors = weights if isinstance(weights, Mapping) else _read(place if weights is None else weights)
    if tensors is not None:
        config = config.detected(tensors)
    handle = Handle(denoiser, config.plugin(config, find_host(denoiser), denoiser))
    handle._mount()
    tensors = handle.plugin.fresh() if tensors is None else tensors
    if tensors is not None:
        try:
            handle.load(tensors)
        except UserError:
            handle.remove()
            raise
    logger.info("%r", handle.summary())
    return handle


@contextmanager
def applied(target: Any, plugin: Any, weights: Weights = None) -> Iterator[Handle]:  # noqa: ANN401
    """`apply` for the time of a with statement."""
    handle = apply(target, plugin, weights)
    try:
        yield handle
    finally:
        handle.remove()


def denoiser_of(target: Any) -> nn.Module:  # noqa: ANN401
    """The UNet or transformer of a pipeline, or the network itself.

    Raises:
        UserError: there is none.
    """
    found = (
        target
        if isinstance(target, nn.Module)
        else getattr(target, "unet", None) or getattr(target, "transformer", None)
    )
    if not isinstance(found, nn.Module):
        raise UserError(
            f"zoo.apply: {type(target).__name__} has neither a unet nor a transformer; give the network itself"
        )
    return found


def settings_of(plugin: Any) -> tuple[Any, Path | None]:  # noqa: ANN401
    """The settings that a name, a folder or a mapping of a name and settings stand for, and the folder.

    Raises:
        UserError: an unknown name, or a folder of something else.
    """
    if hasattr(type(plugin), "plugin"):
        return plugin, None
    if isinstance(plugin, Mapping):
        changes = dict(plugin)
        config, folder = settings_of(changes.pop("name", None))
        try:
            return replace(config, **changes), folder
        except TypeError as error:
            known = [field.name for field in fields(config)]
            wrong = next(name for name in changes if name not in known)
            raise UserError(f"plug-in {plugin['name']!r} has no setting {wrong!r}.{nearest(wrong, known)}") from error
    folder = Path(str(plugin))
    folder = next((place for place in (folder, folder / RUN) if (place / CONFIG).is_file()), None)
    if folder is not None:
        return _settings_in(folder), folder
    known = {name: config for module, _ in METHODS.values() for name, config in _module(module).VARIANTS.items()}
    if plugin not in known:
        raise UserError(f"plug-in {str(plugin)!r} is unknown.{nearest(str(plugin), known)}")
    return known[plugin], None


def _settings_in(folder: Path) -> Any:  # noqa: ANN401
    try:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        module, name = METHODS[said["_class_name"]]
        return getattr(_module(module), name).read(said)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / CONFIG} describes no plug-in of zoo; give the folder that save_pretrained wrote"
        ) from error


def _module(name: str) -> Any:  # noqa: ANN401
    return importlib.import_module(f"{__package__}.{name}")


def _read(weights: str | Path | None) -> dict[str, Tensor] | None:
    if weights is None:
        return None
    path = Path(weights)
    if not path.exists() and is_hub_id(str(weights)):
        path = fetch(str(weights))
    path = next((place for place in (path / FILE, path / RUN / FILE) if place.is_file()), path)
    return read_weights(path)[0]


def _check_free(denoiser: nn.Module) -> None:
    """Refuse what would end in tensors on the wrong device, or in attention within a shard."""
    if hasattr(denoiser, "zoo"):
        raise UserError(f"{denoiser.zoo.plugin.title} is on this denoiser already; call its handle.remove() first")
    for name, module in denoiser.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if hasattr(module, "_hf_hook") or "group_offloading" in hooks:
            raise UserError(f"offload hooks are on {name or 'the denoiser'}; call zoo.apply before enabling offload")
        if getattr(getattr(module, "processor", None), "_parallel_config", None) is not None:
            raise UserError("context parallel is on; zoo's plug-ins see only whole sequences, so disable it first")
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise UserError("the denoiser has parameters on the meta device; load its weights before zoo.apply")


def _check(weights: Mapping[str, Tensor], own: Mapping[str, nn.Parameter], plugin: Plugin) -> None:
    """Names and shapes, before anything is changed."""
    where = f"{plugin.title} on {plugin.host.title}"
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    for keys, what in ((missing, "lack"), (unknown, "have unknown")):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"weights for {where} {what} {keys[0]}{more}; were they trained for another base model?")
    for key, parameter in own.items():
        if weights[key].shape != parameter.shape:
            raise UserError(
                f"weights for {where}: {key} must be {tuple(parameter.shape)}, got {tuple(weights[key].shape)}; were "
                "they trained for another base model?"
            )
