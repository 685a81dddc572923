"""Contact sheets of training samples: clean and degraded side by side, with what was drawn for each."""

from collections.abc import Sequence
from dataclasses import fields

import numpy as np

from zoo import media
from zoo.data.degradations import Bicubic, Degradation, Jpeg, Noise
from zoo.data.images import to_array
from zoo.data.realworld import RealWorld
from zoo.data.restoration import RestorationData
from zoo.data.sampler import StepSampler
from zoo.data.stages import Stage
from zoo.data.weather import Rain, Raindrops, Snow, Weather
from zoo.errors import UserError

STEPS = {step.__name__.lower(): step for step in (Bicubic, Jpeg, Noise, RealWorld, Rain, Snow, Raindrops, Weather)}
_LONGEST = 160  # characters of a step in the title
TRAIN = "train"  # the name of all steps of a recipe together


def default_data(name: str, seed: int = 0) -> RestorationData:
    """The bundled photo, degraded by one step with its default settings.

    Args:
        name: of STEPS.
        seed: decides every sample.

    Raises:
        UserError: `name` needs a recipe.
    """
    if name not in STEPS:
        raise UserError(f"show: --data {name} shows the data of a recipe; name one, or take {', '.join(STEPS)}")
    step = STEPS[name]()
    upscale = step.upscale if isinstance(step, Bicubic | RealWorld) else 1
    return RestorationData("demo", upscale=upscale, degradation=[step], seed=seed)


def sheet(data: RestorationData, name: str, num: int = 8, size: int = 192) -> tuple[np.ndarray, list[str]]:
    """Samples as training would make them, each beside its target; the same picture for the same data and seed.

    Args:
        data: a recipe's, or `default_data`.
        name: of STEPS, for the step of that kind in `data` alone, or TRAIN.
        num: samples.
        size: side of the targets in pixels.

    Returns:
        The sheet, uint8 (h, w, 3), and what was drawn for each sample.

    Raises:
        FileNotFoundError: images are missing.
        UserError: `data` have no such step, or a step cannot work on so small images.
    """
    steps = data.degradation if name == TRAIN else [_step(data, name)]
    crops = data.crops(steps)
    stage = Stage(batch_size=num, patch_size=max(1, size // data.upscale))
    images, labels = [], []
    for draw in StepSampler(len(crops), [stage], data.seed).batch(0):
        sample, facts = crops.told(draw)
        lq = to_array(sample["lq"]).repeat(data.upscale, 0).repeat(data.upscale, 1)  # as large as its target
        images += [to_array(sample["gt"]), lq]
        labels += ["clean", ", ".join(facts) or "unchanged"]
    told = ", ".join(map(_told, steps)) or "no steps"
    return media.grid(images, labels, columns=min(4, 2 * num), title=f"{name}, seed {data.seed}: {told}"), labels[1::2]


def _told(step: Degradation) -> str:
    """A step with its settings; of a long list only those that are not the usual ones."""
    changed = [f"{f.name}={getattr(step, f.name)}" for f in fields(step) if getattr(step, f.name) != f.default]  # pyright: ignore
    return text if len(text := str(step)) <= _LONGEST else f"{type(step).__name__}({', '.join(changed) or 'defaults'})"


def _step(data: RestorationData, name: str) -> Degradation:
    """The first step of that kind among those for training and validation."""
    steps: Sequence[Degradation] = [*data.degradation]
    for spec in data.validation.values():
        steps = [*steps, *spec.degradation]
    found = [step for step in steps if type(step) is STEPS.get(name)]
    if not found:
        known = ", ".join(dict.fromkeys(type(step).__name__.lower() for step in steps)) or "none"
        raise UserError(f"show: these data have no step {name!r}; name {TRAIN}, or one of theirs: {known}")
    return found[0]
