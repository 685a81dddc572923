"""The data of restoration recipes: training crops and named validation sets, behind Lightning's DataModule."""

import logging
from collections.abc import Mapping, Sequence

import torch
from lightning import LightningDataModule

from zoo.data.crops import Crops, ValidationSet, WholeImages
from zoo.data.degradations import Degradation
from zoo.data.images import Report
from zoo.data.sampler import Draw, ResumableLoader
from zoo.data.stages import Plan, Stage
from zoo.errors import UserError

logger = logging.getLogger(__name__)


class RestorationData(LightningDataModule):
    """Batches of crops for training, whole images for validation.

    A training batch is {"lq": (b, c, p, p), "gt": (b, c, p * upscale, p * upscale), "number": int64 (b,)}, images
    float32 in [0, 1], RGB; samples depend on `seed` and their number alone. A validation batch is one image:
    {"lq": (1, c, h, w), "gt": (1, c, h * upscale, w * upscale), "name": str, "set": str}.

    Args:
        source: "photos" (bundled with scikit-image), "demo" (chelsea), a folder of clean images, or a paired folder.
        lq: folder of degraded images, when `source` is the folder of their targets.
        template: lq name for a gt name without ending, such as "{}x4"; null = the usual ones are tried.
        upscale: gt size over lq size; 1 for denoising and the like.
        degradation: steps that make lq; see `Crops`. Empty with upscale > 1 = MATLAB-like bicubic only.
        stages: patch and batch size by optimisation step; the last has no `until`.
        validation: name -> set; null = the validation photos when `source` is photos, else none.
        channels: 3 = RGB, 1 = gray.
        hflip: mirror left-right with probability 1/2.
        vflip: mirror up-down with probability 1/2.
        transpose: swap height and width with probability 1/2.
        scales: factors by which gt is shrunk first, one drawn for each sample; null = none. See `Crops`.
        permute_colours: shuffle the channels of a sample.
        mixup: probability of blending a sample with another one. See `Crops`.
        enlarge: "mirror" or "bilinear": what becomes of images smaller than the crop. See `Crops`.
        seed: decides order, crops, augmentation and degradation.
        workers: processes that make samples; 0 = the training process itself.
        epoch_steps: optimisation steps that count as one epoch.

    Raises:
        UserError: sizes or steps that contradict each other.
    """

    def __init__(
        self,
        source: str = "photos",
        lq: str | None = None,
        template: str | None = None,
        upscale: int = 2,
        degradation: list[Degradation] | None = None,
        stages: list[Stage] | None = None,
        validation: dict[str, ValidationSet] | None = None,
        channels: int = 3,
        hflip: bool = True,
        vflip: bool = True,
        transpose: bool = True,
        scales: list[float] | None = None,
        permute_colours: bool = False,
        mixup: float = 0.0,
        enlarge: str = "mirror",
        seed: int = 0,
        workers: int = 1,
        epoch_steps: int = 1000,
    ) -> None:
        super().__init__()
        if upscale < 1 or channels not in (1, 3):
            raise UserError(f"data: upscale must be >= 1 and channels 1 or 3, got {upscale} and {channels}")
        if workers < 0 or epoch_steps < 1:
            raise UserError(f"data: workers must be >= 0 and epoch_steps >= 1, got {workers} and {epoch_steps}")
        if validation is None:
            validation = {"photos": ValidationSet("photos")} if source == "photos" else {}
        self.source, self.lq, self.template = source, lq, template
        self.upscale, self.channels, self.degradation = upscale, channels, tuple(degradation or ())
        self.stages = Plan(stages or [Stage()]).stages
        self.validation: Mapping[str, ValidationSet] = validation
        self.changes = {"hflip": hflip, "vflip": vflip, "transpose": transpose}
        self.changes["permute_colours"], self.mixup = permute_colours, mixup
        self.enlarge = enlarge
        self.scales = tuple(scales or (1.0,))
        self.seed, self.workers, self.epoch_steps = seed, workers, epoch_steps
        self.train: Crops | None = None
        self.val: list[WholeImages] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Open what the stage needs ("fit", "validate" or None = everything), once, and log what was found.

        Raises:
            FileNotFoundError: a folder or scikit-image is missing.
            UserError: nothing usable is found, or steps contradict the files.
        """
        if self.val is None:
            self.val = [WholeImages(name, spec, self.upscale, self.channels) for name, spec in self.validation.items()]
        if self.train is None and stage in ("fit", None):
            self.train = self.crops(self.degradation)
            if self.degradation:
                for patch in {stage.patch_size for stage in self.stages}:
                    self.train[Draw(0, 0, patch)]  # crops too small for a step are told now, not by a worker
            for report in self.report().values():
                logger.info("%s", report)

    def crops(self, degradation: Sequence[Degradation]) -> Crops:
        """Training samples by steps that need not be the recipe's own.

        Raises:
            FileNotFoundError: a folder or scikit-image is missing.
            UserError: nothing usable is found, or steps contradict the files.
        """
        return Crops(
            self.source,
            self.upscale,
            degradation,
            lq=self.lq,
            template=self.template,
            channels=self.channels,
            seed=self.seed,
            scales=self.scales,
            mixup=self.mixup,
            enlarge=self.enlarge,
            **self.changes,
        )

    def report(self) -> dict[str, Report]:
        """What was found: "train" and every validation set by name; empty before `setup`."""
        reports = {}
        if self.train is not None:
            reports["train"] = self.train.pairs.report()
            for patch in sorted({stage.patch_size for stage in self.stages}):
                if count := self.train.smaller_than(patch):
                    how = "stretched" if self.enlarge == "bilinear" else "enlarged by mirroring"
                    reports["train"].notes.append(f"{count} images are {how} for patch_size {patch}")
        return reports | {whole.name: whole.pairs.report() for whole in self.val or ()}

    def train_dataloader(self) -> ResumableLoader:
        """Endless steps of this rank, from the position that Lightning restores."""
        if self.train is None:
            self.setup("fit")
        assert self.train is not None
        trainer = self.trainer
        return ResumableLoader(
            self.train,
            self.stages,
            self.seed,
            epoch_steps=self.epoch_steps,
            workers=self.workers,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> list[WholeImages]:
        """One iterable of whole images per validation set."""
        if self.val is None:
            self.setup("validate")
        return self.val or []
