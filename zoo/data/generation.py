"""The data of recipes for generators and autoencoders: captioned images behind Lightning's DataModule."""

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import Dataset, default_collate

from zoo.data.buckets import Buckets
from zoo.data.captions import CaptionedFolder
from zoo.data.images import Report
from zoo.data.latents import SHARD, Encode, EncodeText, Latents, fill, plan
from zoo.data.sampler import ResumableLoader, seed_of
from zoo.data.shapes import Shapes
from zoo.data.stages import Plan, Stage
from zoo.errors import UserError
from zoo.files import cache_folder

logger = logging.getLogger(__name__)

_FOLDER_ONLY = {"captions": None, "multiple": 8, "aspect": 2.0, "hflip": False}


class GenerationData(LightningDataModule):
    """Batches of captioned images.

    A batch is {"image": float32 (b, 3, h, w) in [0, 1], "caption": list of str, "number": int64 (b,)}; samples depend
    on `seed` and their number alone. Of shapes world h = w = patch_size, and there is "scene", see `Shapes`; the images
    of a folder go to buckets of about that area, one bucket a step. Validation batches are always the same: captions of
    shapes world that training never sees, or the images of a folder whose names have the smallest hashes, which
    training never sees either.

    Args:
        source: "shapes" (shapes world), or a folder of images with captions, see `CaptionedFolder`.
        stages: image side (`patch_size`) and batch size by optimisation step; the last has no `until`.
        render_sizes: shapes world only: sides at which scenes are painted; images are crops of them. null = the image.
        things: shapes world only: how many in each picture; null = one to three.
        cache: how many samples to encode once, by a task that trains on latents; they then come again in every pass.
            Of a folder all are encoded, so that the number must be as large. 0 = every sample is encoded when its turn
            comes.
        validation: how many images to validate on.
        seed: decides everything random.
        workers: processes that make samples; 0 = the training process itself.
        epoch_steps: optimisation steps that count as one epoch.
        captions: folders only: column of the captions in tables; null = text, caption or prompt; "none" = images need
            no captions.
        multiple: folders only: what height and width are multiples of, pixels.
        aspect: folders only: longest side over shortest at most; 1 = squares.
        hflip: folders only: mirror left-right with probability 1/2; captions may say left and right.

    Raises:
        UserError: numbers that contradict each other, or settings that the source has no use for.
    """

    def __init__(
        self,
        source: str = "shapes",
        stages: list[Stage] | None = None,
        render_sizes: list[int] | None = None,
        things: int | None = None,
        cache: int = 0,
        validation: int = 64,
        seed: int = 0,
        workers: int = 0,
        epoch_steps: int = 1000,
        captions: str | None = None,
        multiple: int = 8,
        aspect: float = 2.0,
        hflip: bool = False,
    ) -> None:
        super().__init__()
        if workers < 0 or epoch_steps < 1 or min(validation, cache) < 0:
            raise UserError(
                "data: workers, cache and validation must be >= 0 and epoch_steps >= 1, "
                f"got {workers}, {cache}, {validation} and {epoch_steps}"
            )
        given = {"captions": captions, "multiple": multiple, "aspect": aspect, "hflip": hflip}
        useless = [name for name, value in given.items() if value != _FOLDER_ONLY[name]]
        if source == "shapes" and useless:
            raise UserError(f"data: {useless[0]} is for folders, shapes world has no use for it; remove it")
        if source != "shapes" and (render_sizes or things):
            raise UserError(
                "data: render_sizes and things are for shapes world, a folder has no use for them; remove them"
            )
        if cache and hflip:
            raise UserError("data: cached latents cannot be mirrored; remove hflip or cache")
        largest = max((stage.patch_size for stage in stages or [Stage()]), default=0)
        if render_sizes and max(render_sizes) < largest:
            raise UserError(f"data: render_sizes {render_sizes} are all below patch_size {largest}; raise one of them")
        self.source, self.stages = source, Plan(stages or [Stage()]).stages
        if cache and len({stage.patch_size for stage in self.stages}) > 1:
            raise UserError("data: cached latents have one patch_size; give all stages the same, or remove cache")
        self.world: dict[str, Any] = {"render_sizes": tuple(render_sizes or ()), "things": things}
        self.cache = cache
        self.latents: Latents | None = None
        self.validation, self.seed, self.workers, self.epoch_steps = validation, seed, workers, epoch_steps
        self.captions = captions
        self.shaping: dict[str, Any] = {"multiple": multiple, "aspect": aspect}
        self.hflip = hflip
        self.images: CaptionedFolder | None = None
        self.train: Buckets | Shapes | None = None
        self._chosen: list[int] = []
        self._held: list[int] = []

    def setup(self, stage: str | None = None) -> None:
        """Open the source once, and log what was found in a folder.

        Raises:
            FileNotFoundError: there is no such folder.
            UserError: nothing usable is found, or validation would take all of it.
        """
        if self.train is not None:
            return
        if self.source == "shapes":
            self.train = Shapes(self.seed, side=self.stages[-1].patch_size, **self.world)
            return
        self.images = CaptionedFolder(self.source, column=self.captions)
        count = len(self.images)
        if self.validation >= count:
            raise UserError(
                f"data: validation {self.validation} leaves none of the {count} images of {self.source} to train on; "
                "lower it"
            )
        if 0 < self.cache < count - self.validation:
            raise UserError(
                f"data: cache {self.cache} is smaller than the {count - self.validation} images of {self.source}; "
                "raise it, or set it to 0"
            )
        order = sorted(range(count), key=lambda index: seed_of(0, "held out", self.images.names[index]))  # pyright: ignore
        self._held, self._chosen = sorted(order[: self.validation]), sorted(order[self.validation :])
        self.train = self._buckets(self._chosen, hflip=self.hflip)
        for report in self.report().values():
            logger.info("%s", report)

    def report(self) -> dict[str, Report]:
        """What was found in a folder, "train"; empty for shapes world and before `setup`."""
        if not isinstance(self.train, Buckets):
            return {}
        report = self.train.report()
        report.notes.append(f"{len(self._held)} of them are held out for validation")
        return {"train": report}

    def check_captions(self) -> None:
        """Refuse crops that leave out what their captions tell of; for tasks that read captions.

        Raises:
            UserError: scenes are painted larger than the pictures that training takes.
        """
        if self.world["render_sizes"] and max(self.world["render_sizes"]) > min(s.patch_size for s in self.stages):
            raise UserError("data: larger render_sizes cut off what captions tell of; remove them for this task")

    def encode(self, encode: Encode, encoder: str, encode_text: EncodeText | None = None) -> None:
        """Encode the samples that training takes, or find them where an earlier run has put them.

        Each rank encodes its share; with several machines, each completes what others have not put on its disk.

        Args:
            encode: a batch of images -> tensors to keep.
            encoder: tells one encoder's weights from another's.
            encode_text: captions -> tensors to keep.
        """
        self.setup("fit")
        assert self.train is not None
        samples: Dataset = self.train
        if isinstance(self.train, Buckets):
            samples = self._buckets(self._chosen, every_caption=True)
            sizes = self.train.sizes(self.stages[-1].patch_size)
            groups = {f"{w}x{h}": [n for n, size in enumerate(sizes) if size == (h, w)] for h, w in sorted(set(sizes))}
            count = len(sizes)
        else:  # whole shards, so that a larger count goes on where a smaller one ended
            groups, count = {"shard": range(-(-self.cache // SHARD) * SHARD)}, self.cache
        folder = cache_folder() / "latents" / f"{self._fingerprint()}-{encoder}"
        logger.info("latents of %d samples: %s", count, folder)
        shards = plan(groups)
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        for share in (shards[rank::world], shards if trainer is None or trainer.local_rank == 0 else []):
            fill(folder, samples, share, encode, encode_text, workers=self.workers, progress=_said())
            if trainer is not None:
                trainer.strategy.barrier()
        self.latents = Latents(folder, shards, seed=self.seed, count=count)

    def train_dataloader(self) -> ResumableLoader:
        """Endless steps of this rank, from the position that Lightning restores.

        Raises:
            UserError: samples shall be cached, but the task trains on images and did not encode them.
        """
        self.setup("fit")
        assert self.train is not None
        if self.cache and self.latents is None:
            raise UserError("data: this task does not train on latents, so that none are cached; remove cache")
        trainer = self.trainer
        return ResumableLoader(
            self.latents or self.train,
            self.stages,
            self.seed,
            epoch_steps=self.epoch_steps,
            workers=self.workers,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            groups=self.train.groups if isinstance(self.train, Buckets) else None,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> "list[HeldOut]":
        """What training never sees, the same in every validation and on every rank."""
        self.setup("validate")
        if not self.validation:
            return []
        side, most = self.stages[-1].patch_size, min(16, self.stages[-1].batch_size)
        if self.images is None:
            return [HeldOut(Shapes(self.seed, held_out=True, side=side), [range(self.validation)], most)]
        held = self._buckets(self._held)
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(held.sizes(side)):
            groups.setdefault(size, []).append(index)
        return [HeldOut(held, list(groups.values()), most)]

    def _buckets(self, chosen: Sequence[int], **changes: bool) -> Buckets:
        assert self.images is not None
        return Buckets(self.images, chosen, self.stages, seed=self.seed, **self.shaping, **changes)

    def _fingerprint(self) -> str:
        """What the samples are, in few letters: another paint, file or caption gives another name."""
        digest = hashlib.blake2b(digest_size=8)
        if isinstance(self.train, Buckets):
            assert self.images is not None
            sizes = self.train.sizes(self.stages[-1].patch_size)
            for index, size in zip(self._chosen, sizes, strict=True):
                about = self.images.path(index).stat()
                fact = (self.images.names[index], size, about.st_size, about.st_mtime_ns, self.images.captions[index])
                digest.update(repr(fact).encode(errors="surrogatepass"))
            return f"folder-{digest.hexdigest()}"
        assert self.train is not None
        for number in range(8):
            sample = self.train[number]
            digest.update(f"{self.seed} {sample['caption']}".encode() + sample["image"].numpy().tobytes())
        return f"shapes-{digest.hexdigest()}"


class HeldOut:
    """Samples in batches, always the same ones.

    Args:
        data: the samples.
        groups: numbers of those that can share a batch.
        batch_size: samples at once, at most.
    """

    def __init__(self, data: Dataset, groups: Sequence[Sequence[int]], batch_size: int) -> None:
        self.data = data
        self.batches = [some[at : at + batch_size] for some in groups for at in range(0, len(some), batch_size)]

    def __len__(self) -> int:
        """Batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All batches in order."""
        for numbers in self.batches:
            yield default_collate([self.data[number] for number in numbers])


def _said() -> Any:  # noqa: ANN401
    """Tells the log of progress, at most every ten seconds."""
    said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            logger.info("encoded %d of %d samples", done, total)

    return progress
