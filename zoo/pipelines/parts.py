"""The parts of a diffusers pipeline from plain data: folders and hub ids, or a class of diffusers or transformers."""

import contextlib
import hashlib
import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import shipped
from zoo.errors import UserError, nearest
from zoo.models.weights import tensor_hash
from zoo.pipelines.words import build_text_encoder, build_tokenizer
from zoo.scene import WORDS

SETTINGS = "sampling.json"  # beside model_index.json; diffusers leaves it alone
Spec = str | dict[str, Any]  # a folder or hub id, or {"class_name": ..., keywords of the class}


def open_pipeline(name: str, **keywords: Any) -> Any:  # noqa: ANN401 (classes of diffusers share no base)
    """A diffusers pipeline from a folder, a shipped name or a hub id, of the class that its model_index.json names.

    Args:
        name: such as "shapes-sd", "runs/0003/pipeline" or "stabilityai/sd-turbo".
        **keywords: of `from_pretrained`.

    Raises:
        FileNotFoundError: the hub has it not, or cannot be reached.
        UserError: the folder holds no pipeline.
    """
    place = locate(name)
    folder = Path(place)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"pipeline: {name} has no model_index.json, so it is no diffusers pipeline; name its folder")
    try:
        with quiet():
            return _diffusers().DiffusionPipeline.from_pretrained(
                place, local_files_only=folder.is_dir() or None, **keywords
            )
    except OSError as error:
        raise FileNotFoundError(
            f"pipeline: {name!r} is neither a folder here nor to be had from the hub; check the name or the network"
        ) from error
    except (ValueError, KeyError, RuntimeError) as error:
        if "low_cpu_mem_usage" in str(error):  # diffusers opens parts that stay in float32 only with its help
            raise UserError(f"pipeline: {name} needs accelerate to be opened; pip install accelerate") from error
        raise UserError(f"pipeline: {name} cannot be opened ({_first(error)}); get its files again") from error


def locate(name: str) -> str:
    """What diffusers shall open: a run's pipeline folder, a shipped folder, or the name as it is."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder)
    kept = shipped.folder("checkpoints") / name
    return str(kept) if "/" not in name and kept.is_dir() else name


def save_pipeline(pipe: Any, folder: Path, steps: int, guidance: float) -> None:  # noqa: ANN401
    """Fill a folder that diffusers opens, and note what the pipeline should be sampled with."""
    with quiet():
        pipe.save_pretrained(folder)
    settings = json.dumps({"steps": steps, "guidance": guidance})
    (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")


def read_settings(name: str) -> dict[str, Any]:
    """Steps and guidance that a local pipeline should be sampled with; empty where nothing tells."""
    file = Path(locate(name)) / SETTINGS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def assemble(pipeline: str, parts: Mapping[str, Spec]) -> Any:  # noqa: ANN401
    """A pipeline of a class, from its parts.

    Args:
        pipeline: class name of diffusers.
        parts: name of the part -> where it lies, or how it is built. A tokenizer {"class_name": "CLIPTokenizer",
            "words": "shapes"} knows the words of shapes world.

    Raises:
        UserError: an unknown class, part or keyword.
    """
    cls = _class(pipeline, "pipeline")
    known = inspect.signature(cls.__init__).parameters
    for name in parts:
        if name not in known:
            raise UserError(f"{pipeline} has no part {name!r}.{nearest(name, known)}")
    built = build_parts(parts)
    empty = {
        name: None
        for name, parameter in known.items()
        if name not in built and name != "self" and parameter.default is parameter.empty
    }
    switches = {"requires_safety_checker": False} if "requires_safety_checker" in known else {}
    return cls(**built, **empty, **switches)


def build_parts(parts: Mapping[str, Spec]) -> dict[str, Any]:
    """The parts alone; see `assemble`."""
    tokenizers = {name: _part(name, spec, {}) for name, spec in parts.items() if name.startswith("tokenizer")}
    others = {name: _part(name, spec, tokenizers) for name, spec in parts.items() if name not in tokenizers}
    return tokenizers | others


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers and diffusers show no bars and no advice."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (level, bars) in zip(logs, before, strict=True):
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


def to_latents(vae: Any, pixels: Tensor) -> Tensor:  # noqa: ANN401
    """Encode pixels in [0, 1] to latents of about unit variance, by the mean of the posterior.

    Args:
        vae: an autoencoder of diffusers.
        pixels: (b, c, h, w), or (b, c, t, h, w) for video autoencoders.
    """
    latents = vae.encode(pixels * 2 - 1).latent_dist.mode()
    mean, std = _moments(vae, latents)
    return (latents - mean) / std


def to_pixels(vae: Any, latents: Tensor) -> Tensor:  # noqa: ANN401
    """The way back of `to_latents`; about [0, 1], not clamped."""
    mean, std = _moments(vae, latents)
    return vae.decode(latents * std + mean).sample / 2 + 0.5


def digest(*parts: Any) -> str:  # noqa: ANN401
    """Tells networks and tokenizers with other weights, words or settings apart: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            config: Any = part.config
            about = config if isinstance(config, dict) else config.to_dict()
            about = {key: value for key, value in about.items() if not key.startswith("_")}  # such as its folder
            found.update(tensor_hash(part.state_dict()).encode())
        else:
            about = {"words": sorted(part.get_vocab().items()), "length": part.model_max_length}
        found.update(repr(sorted(about.items())).encode(errors="surrogatepass"))
    return found.hexdigest()[:16]


def _moments(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Mean and standard deviation of an autoencoder's latents, as its config has them."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        mean, std = [getattr(config, "shift_factor", None) or 0.0], [1 / config.scaling_factor]
    shape = (1, -1) + (1,) * (latents.ndim - 2)  # Wan, LTX: one pair per channel
    return torch.tensor(mean).view(shape).to(latents), torch.tensor(std).view(shape).to(latents)


def _part(name: str, spec: Spec, tokenizers: Mapping[str, Any]) -> Any:  # noqa: ANN401
    if isinstance(spec, str):
        return _from_folder(name, spec)
    keywords = dict(spec)
    if "class_name" not in keywords:
        raise UserError(f"part {name!r} needs a class_name, or the name of a folder, got the keys {sorted(keywords)}")
    class_name = keywords.pop("class_name")
    if class_name == "CLIPTokenizer":
        words = keywords.pop("words", None)
        if words != "shapes":
            raise UserError(f"part {name!r}: words must be shapes, got {words!r}; or name a folder with a tokenizer")
        return _built(name, lambda: build_tokenizer(WORDS, **keywords))
    if class_name == "CLIPTextModel":
        tokenizer = tokenizers.get(name.replace("text_encoder", "tokenizer"))
        if tokenizer is None:
            raise UserError(f"part {name!r} needs its tokenizer among the parts")
        return _built(name, lambda: build_text_encoder(tokenizer, keywords))
    cls = _class(class_name, f"part {name!r}")
    takes = inspect.signature(cls.__init__).parameters
    for key in keywords:
        if key not in takes:
            raise UserError(f"part {name!r}: {class_name} takes no {key!r}.{nearest(key, takes)}")
    return _built(name, lambda: cls(**keywords))


def _built(name: str, build: Any) -> Any:  # noqa: ANN401
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise UserError(f"part {name!r}: {_first(error)}") from error


def _from_folder(name: str, place: str) -> Any:  # noqa: ANN401
    """A part that was saved alone, or inside a pipeline's folder."""
    import transformers

    folder = Path(locate(place))
    folder = folder / name if (folder / name).is_dir() else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"part {name!r}: {place} is no folder; train it first, or name one that is there")
    if name.startswith("tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(folder)
    if name == "scheduler":
        return _class(
            json.loads((folder / "scheduler_config.json").read_text())["_class_name"], "part 'scheduler'"
        ).from_pretrained(folder)
    with contextlib.suppress(OSError, ValueError, KeyError), quiet(), torch.device("cpu"):
        return _diffusers().AutoModel.from_pretrained(str(folder), local_files_only=True)
    raise UserError(f"part {name!r}: {place} holds no model of diffusers or transformers; name its folder")


def _class(name: str, what: str) -> Any:  # noqa: ANN401
    """A class of diffusers or transformers that plain data can build."""
    from transformers import PreTrainedModel

    diffusers = _diffusers()
    bases: Any = (diffusers.ModelMixin, diffusers.SchedulerMixin, diffusers.DiffusionPipeline, PreTrainedModel)
    for library in ("diffusers", "transformers"):
        with quiet():  # without torchvision transformers advises to install it, whenever a pipeline is imported
            found = getattr(importlib.import_module(library), name, None) if name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, bases):
            return found
    known = [n for n in dir(diffusers) if n[0].isupper()]
    raise UserError(f"{what}: diffusers has no class {name!r}.{nearest(name, known)}")


def _diffusers() -> Any:  # noqa: ANN401 (its types are not exported from where its names are)
    return importlib.import_module("diffusers")


def _first(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
