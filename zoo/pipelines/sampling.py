"""A prompt in, a picture out, through any text-to-image pipeline of diffusers."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from zoo import __version__
from zoo.errors import UserError, nearest
from zoo.models.weights import tensor_hash
from zoo.pipelines.parts import open_pipeline, quiet, read_settings
from zoo.pipelines.words import speaks_shapes
from zoo.scene import unknown_words

DEFAULT = "shapes-sd"


@dataclass(frozen=True)
class Settings:
    """How pictures are made. None = as the pipeline itself, or the run that trained it, has it.

    Attributes:
        steps: of denoising.
        guidance: classifier-free guidance scale.
        negative: what the picture shall not show.
        size: width and height, pixels.
        scheduler: class name of diffusers.
        seed: of the first picture; the next ones count on.
    """

    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    size: tuple[int, int] | None = None
    scheduler: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers that no picture comes from."""
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"guidance must be a number, such as 4.0, got {self.guidance}")
        if self.size is not None and min(self.size) < 8:
            raise UserError(f"size must be at least 8 pixels a side, got {self.size[0]}x{self.size[1]}")


@dataclass(frozen=True)
class Made:
    """One picture.

    Attributes:
        prompt: what it was made from.
        seed: of its noise.
        pixels: float32 (h, w, 3) in [0, 1].
    """

    prompt: str
    seed: int
    pixels: np.ndarray


class Sampler:
    """A pipeline with its settings.

    Each picture is made alone and from its own generator on the CPU, so that it depends neither on the pictures made
    with it nor on the device.

    Args:
        pipeline: a folder, a run of `zoo fit`, a shipped name or a hub id; or a pipeline object.
        settings: see `Settings`.
        device: "cpu", "cuda" or a torch device.
        dtype: torch dtype of the networks.

    Raises:
        FileNotFoundError: the pipeline is not to be had.
        UserError: no pipeline, unknown scheduler, or one that does not suit the pipeline.
    """

    def __init__(
        self,
        pipeline: Any = DEFAULT,  # noqa: ANN401 (a name, or one of the classes of diffusers, which share no base)
        settings: Settings | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        settings = settings or Settings()
        self.name = pipeline if isinstance(pipeline, str) else type(pipeline).__name__
        known = read_settings(pipeline) if isinstance(pipeline, str) else {}
        self.pipe = open_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
        with quiet():
            self.pipe.to(device=device, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        takes = inspect.signature(self.pipe.__call__).parameters
        if "prompt" not in takes:
            raise UserError(f"pipeline: {type(self.pipe).__name__} takes no prompt; name a text-to-image pipeline")
        defaults = {name: takes[name].default for name in ("num_inference_steps", "guidance_scale") if name in takes}
        self.steps = settings.steps or known.get("steps") or defaults.get("num_inference_steps", 50)
        guidance = known.get("guidance", defaults.get("guidance_scale"))
        self.guidance = guidance if settings.guidance is None else settings.guidance
        self.settings = settings
        if settings.scheduler is not None:
            self.pipe.scheduler = _scheduler(settings.scheduler, self.pipe.scheduler)
        wanted = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "negative_prompt": settings.negative,
            "width": settings.size and settings.size[0],
            "height": settings.size and settings.size[1],
        }
        self._keywords = {name: value for name, value in wanted.items() if value is not None}
        for name in self._keywords:
            if name not in takes:
                raise UserError(f"pipeline: {type(self.pipe).__name__} takes no {name}; leave it out")

    @property
    def weights(self) -> str:
        """sha256 over all networks of the pipeline."""
        networks = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        return tensor_hash({f"{n}.{key}": t for n, part in networks.items() for key, t in part.state_dict().items()})

    def advice(self, prompt: str) -> list[str]:
        """What a prompt holds that the pipeline cannot heed; a sentence each.

        Raises:
            UserError: the prompt is empty.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; say what the picture shall show, such as 'a red circle'")
        said = []
        tokenizer = getattr(self.pipe, "tokenizer", None)
        if speaks_shapes(tokenizer) and (odd := unknown_words(prompt)):
            shown = ", ".join(repr(word[:20]) for word in odd[:5]) + (", ..." if len(odd) > 5 else "")
            said.append(f"shapes world does not know {shown}; README.md lists its words")
        with quiet():
            count = len(tokenizer(prompt).input_ids) if tokenizer is not None else 0
        if tokenizer is not None and count > tokenizer.model_max_length:
            said.append(f"the prompt has {count} tokens and only the first {tokenizer.model_max_length} count")
        return said

    def sample(
        self,
        prompts: list[str],
        num: int = 1,
        *,
        seed: int | None = None,
        step: Callable[[int, int, str], None] | None = None,
    ) -> Iterator[Made]:
        """Pictures, `num` of each prompt, with seeds counting up anew for each prompt.

        Args:
            prompts: one or more.
            num: pictures of each.
            seed: the first; None = that of the settings.
            step: called with steps done and steps in all, over all pictures, and the prompt.

        Raises:
            UserError: the pipeline refuses the size or another setting, or its result is not a number.
        """
        total = len(prompts) * num * self.steps
        first = self.settings.seed if seed is None else seed
        for number in range(len(prompts) * num):
            prompt, own = prompts[number // num], first + number % num

            def tell(pipe: object, index: int, timestep: object, keywords: dict, number: int = number) -> dict:
                if step is not None:
                    step(number * self.steps + index + 1, total, prompts[number // num])
                return keywords

            yield Made(prompt, own, self._one(prompt, own, tell))

    def facts(self, made: Made) -> dict[str, str]:
        """What a picture was made with, as texts for its file."""
        height, width = made.pixels.shape[:2]
        known = {
            "Software": f"zoo {__version__}",
            "zoo:prompt": made.prompt,
            "zoo:negative": self.settings.negative or "",
            "zoo:seed": str(made.seed),
            "zoo:steps": str(self.steps),
            "zoo:guidance": "" if self.guidance is None else f"{self.guidance:g}",
            "zoo:scheduler": type(self.pipe.scheduler).__name__,
            "zoo:size": f"{width}x{height}",
            "zoo:pipeline": self.name,
        }
        return {name: text for name, text in known.items() if text}

    def _one(self, prompt: str, seed: int, tell: Callable[..., dict]) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad(), quiet():
                out = self.pipe(
                    prompt, generator=generator, output_type="np", callback_on_step_end=tell, **self._keywords
                )
        except ValueError as error:  # diffusers checks sizes and the like itself, and says what it wants
            raise UserError(f"{type(self.pipe).__name__}: {str(error).strip().splitlines()[0]}") from error
        if not hasattr(out, "images"):
            raise UserError(f"pipeline: {type(self.pipe).__name__} makes no images; name a text-to-image pipeline")
        pixels = np.asarray(out.images[0], np.float32)
        if not np.isfinite(pixels).all():
            raise UserError(f"{self.name} returned values that are not numbers; use float32 or less guidance")
        return pixels


def _scheduler(name: str, present: Any) -> Any:  # noqa: ANN401
    """A scheduler of another class with the settings of the present one."""
    import diffusers

    known = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    full = name if name in known else f"{name}Scheduler"
    if full not in known:
        raise UserError(f"scheduler {name!r} is unknown.{nearest(full, known)}")
    compatible = {cls.__name__ for cls in present.compatibles} | {type(present).__name__}
    if full not in compatible:
        raise UserError(
            f"scheduler {full} does not suit this pipeline's {type(present).__name__}; "
            f"choose one of {', '.join(sorted(compatible))}"
        )
    return getattr(diffusers, full).from_config(present.config)
