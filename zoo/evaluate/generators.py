"""How well a pipeline obeys prompts of shapes world, and how close its pictures come to the world's own.

Beside the pipeline stand what bounds its score from above (real pictures, and the same through its autoencoder) and
from below (its pictures judged by another prompt, and noise).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from zoo import media
from zoo.data.images import to_array, to_tensor
from zoo.data.sampler import seed_of
from zoo.data.shapes import Sample, draw, render
from zoo.errors import UserError
from zoo.metrics import fid
from zoo.metrics.prompt import CORE, Verdict, judge
from zoo.pipelines.parts import to_latents, to_pixels
from zoo.pipelines.sampling import DEFAULT, Sampler, Settings
from zoo.scene import MOST, Scene, parse

PictureProgress = Callable[[float, int, str], None]  # pictures made (parts count), pictures in all, what is being done
_BATCH = 32  # pictures through the autoencoder at once


@dataclass(frozen=True)
class PromptScores:
    """One row of the table.

    Attributes:
        name: of the pipeline, or of a bound.
        verdicts: one per prompt.
        things: how many the prompt of each verdict names.
        distances: FID and KID to real pictures; empty where they say nothing.
    """

    name: str
    verdicts: list[Verdict] = field(repr=False)
    things: list[int] = field(repr=False)
    distances: list[fid.Score] = field(default_factory=list)

    def share(self, attribute: str = "all", things: int | None = None) -> float:
        """Share of pictures with an attribute of CORE or EXTRA, or "all" of CORE; NaN where there is no such prompt.

        Args:
            attribute: which.
            things: only prompts of so many things.
        """
        some = [v for v, count in zip(self.verdicts, self.things, strict=True) if things in (None, count)]
        return sum(getattr(verdict, attribute) for verdict in some) / len(some) if some else float("nan")


class PromptTrial:
    """A pipeline and prompts that nothing was trained on, as many of one, two and three things each.

    Args:
        pipeline: as for `Sampler`.
        num: how many prompts, all different.
        settings: of sampling; the seed also decides the prompts.
        things: only prompts of so many things; None = all.
        features: network for FID and KID, as for `zoo.metrics.fid`; None = neither.
        device: of the pipeline.

    Raises:
        FileNotFoundError: the pipeline is not to be had.
        UserError: impossible numbers, or no text-to-image pipeline.
    """

    def __init__(
        self,
        pipeline: Any = DEFAULT,  # noqa: ANN401
        num: int = 500,
        settings: Settings | None = None,
        *,
        things: int | None = None,
        features: str | None = fid.DEFAULT,
        device: torch.device | str = "cpu",
    ) -> None:
        if num < 2:
            raise UserError(f"evaluate: at least 2 prompts are needed, got {num}")
        if things is not None and not 1 <= things <= MOST:
            raise UserError(f"evaluate: things must be 1 to {MOST}, got {things}")
        self.sampler = Sampler(pipeline, settings, device=device)
        self.samples = unseen(self.sampler.settings.seed, num, things)
        self.things, self.features = things, features
        self.pictures: list[np.ndarray] = []

    @property
    def protocol(self) -> str:
        """What has to be said beside every number."""
        sampler, guidance = self.sampler, self.sampler.guidance
        return (
            f"{len(self.samples)} unseen prompts, seed {sampler.settings.seed}, {sampler.steps} steps"
            f"{'' if guidance is None else f', guidance {guidance:g}'}, {type(sampler.pipe.scheduler).__name__}"
        )

    def run(self, progress: PictureProgress | None = None) -> list[PromptScores]:
        """Make and judge everything.

        Args:
            progress: called with the progress.
        """
        total, seed = len(self.samples), self.sampler.settings.seed
        self.pictures = []
        for number, sample in enumerate(self.samples):

            def told(done: int, whole: int, prompt: str, number: int = number) -> None:
                if progress is not None:
                    progress(number + done / whole, total, prompt[:40])

            (made,) = self.sampler.sample([sample.caption], seed=seed + number, step=told)
            self.pictures.append(made.pixels)
        real = [self._fitted(sample) for sample in self.samples]
        scenes = [parse(sample.caption) for sample in self.samples]
        random = np.random.RandomState(seed_of(seed, "noise") % 2**32)
        noise = [random.uniform(size=picture.shape).astype(np.float32) for picture in self.pictures]
        # Of as many things as the picture's own prompt, else only counting would be tested.
        step = 1 if self.things else MOST
        whole = len(scenes) // step * step
        others = scenes[step:whole] + scenes[:step]
        rows = [
            self._row("real pictures", real, scenes),
            self._row("through the autoencoder", self._round_trip(real), scenes),
            self._row(self.sampler.name, self.pictures, scenes),
            self._row("other prompts", self.pictures[:whole], others),
            self._row("noise", noise, scenes),
        ]
        return rows

    def figure(self, row: PromptScores, count: int = 24) -> np.ndarray:
        """Pictures with their prompts, wrong ones marked by what is wrong. uint8 (h, w, 3)."""
        labels = []
        for sample, verdict in zip(self.samples[:count], row.verdicts, strict=False):
            wrong = [name for name in CORE if not getattr(verdict, name)]
            labels.append(f"{sample.caption} [wrong: {', '.join(wrong)}]" if wrong else sample.caption)
        return media.grid(self.pictures[:count], labels, columns=6, title=f"{row.name}: {self.protocol}")

    def _row(self, name: str, pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> PromptScores:
        verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
        things = [len(scene.things) for scene in scenes]
        distances = []
        if self.features is not None and name != "other prompts":
            distances = fid.scores(pictures, self._world, self.features)
        return PromptScores(name, verdicts, things, distances)

    @cached_property
    def _world(self) -> torch.Tensor | list[np.ndarray]:
        """What pictures should resemble: features of real ones, or these themselves where the network is not here.

        They are of other numbers of the same world: those of the same prompts would be too close to be true.
        """
        world = unseen(self.sampler.settings.seed + 1, len(self.samples), self.things)
        real = [self._fitted(sample) for sample in world]
        try:
            return fid.features(real, self.features or fid.DEFAULT)
        except FileNotFoundError:
            return real

    def _fitted(self, sample: Sample) -> np.ndarray:
        """The true picture at the size of the pipeline's."""
        return media.to_unit(render(sample.scene, sample.places, min(self.pictures[0].shape[:2])))

    @torch.no_grad()
    def _round_trip(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        vae, found = self.sampler.pipe.vae, []
        for first in range(0, len(pictures), _BATCH):
            images = torch.stack([to_tensor(media.to_uint8(p)) for p in pictures[first : first + _BATCH]])
            latents = to_latents(vae, images.to(vae.device, vae.dtype))
            found += [to_array(image) for image in to_pixels(vae, latents)]
        return found


def unseen(seed: int, num: int, things: int | None = None) -> list[Sample]:
    """Different captions of the tenth that is held out, with their scenes; one, two and three things in turn.

    Args:
        seed: of the world.
        num: how many.
        things: only so many things; None = all numbers alike.
    """
    found: dict[str, Sample] = {}
    number = 0
    while len(found) < num:
        sample = draw(seed, number, held_out=True, things=things or 1 + len(found) % MOST)
        found.setdefault(sample.caption, sample)
        number += 1
        if number > 20 * num + 1000:
            raise UserError(f"evaluate: there are no {num} different unseen prompts of {things} things; ask for fewer")
    return list(found.values())
