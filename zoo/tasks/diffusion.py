"""Training of denoisers: any that a pipeline of diffusers holds, by epsilon, v or flow prediction."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo import media
from zoo.data.sampler import seed_of
from zoo.errors import UserError, nearest
from zoo.files import write_folder
from zoo.metrics.prompt import judge
from zoo.pipelines.families import Context, family
from zoo.pipelines.parts import assemble, build_parts, digest, open_pipeline, save_pipeline, to_latents
from zoo.pipelines.tiling import evaluating
from zoo.scene import parse
from zoo.tasks.noising import Noising
from zoo.tasks.optimizers import configured

log = logging.getLogger(__name__)


class DiffusionTask(LightningModule):
    """Trains parts of a pipeline to remove noise from latents, `b c h w` or `b c t h w`.

    The prediction is what the scheduler's config says: epsilon, v_prediction, sample, or flow for flow-matching
    schedulers. Noise, timestep and the dropping of captions are functions of (seed, number of the sample in the run).
    It logs train/loss and, after each validation, val/loss at fixed noise and, where asked for, val/adherence: the
    share of pictures in which everything is as the caption says, also apart by the number of things.

    Args:
        pipeline: class of diffusers into which `parts` go, or a folder, shipped name or hub id to train further; in
            Python also a pipeline object.
        parts: name of a part -> folder, or class_name and keywords; with a folder as `pipeline` they replace its own.
        train: names of the parts that are trained; the others stay as they are.
        optimizer: as for RestorationTask.
        schedule: as for RestorationTask.
        drop_caption: probability of training without the caption, which classifier-free guidance needs.
        min_snr_gamma: bound of the signal-to-noise ratio in the weight of a timestep (Hang et al. 2023); null = all
            timesteps count alike.
        timesteps: "uniform", or "logit_normal" (Esser et al. 2024).
        adherence: on how many captions of validation pictures are made and judged; 0 = none. Shapes world only.
        prompts: of the previews.
        steps: of sampling, in previews and for whoever uses the pipeline later.
        guidance: likewise.
        seed: decides noise, timesteps and dropped captions.

    Raises:
        FileNotFoundError: a part is not there.
        UserError: unknown classes or keywords, or settings that contradict the scheduler.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        train: list[str],
        optimizer: dict[str, Any],
        parts: dict[str, str | dict[str, Any]] | None = None,
        schedule: dict[str, Any] | None = None,
        drop_caption: float = 0.1,
        min_snr_gamma: float | None = None,
        timesteps: str = "uniform",
        adherence: int = 0,
        prompts: list[str] | None = None,
        steps: int = 25,
        guidance: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=[] if isinstance(pipeline, str) else ["pipeline"])
        if not 0 <= drop_caption <= 1:
            raise UserError(f"task: drop_caption must be a probability, got {drop_caption}")
        if not isinstance(pipeline, str):
            self.pipe = pipeline
        elif pipeline.endswith("Pipeline") and pipeline.isidentifier():
            self.pipe = assemble(pipeline, parts or {})
        else:
            self.pipe = open_pipeline(pipeline, **build_parts(parts or {}))
        self.family = family(type(self.pipe).__name__)
        modules = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        self.frozen = [part.requires_grad_(False).eval() for name, part in modules.items() if name not in train]
        self.trained = self._to_train(modules, train)
        self.optimizer_spec, self.schedule_spec = optimizer, schedule
        self.drop_caption, self.seed = drop_caption, seed
        self.prompts, self.steps, self.guidance = list(prompts or []), steps, guidance
        self.protocol = f"{steps} steps, guidance {guidance:g}"
        self.noising = Noising(self.pipe.scheduler, timesteps=timesteps, min_snr_gamma=min_snr_gamma, seed=seed)
        if adherence and self.family.clips:
            raise UserError("task: adherence is judged on pictures, and this pipeline makes clips; set adherence: 0")
        self.adherence = adherence
        self._losses: list[Tensor] = []
        self._captions: list[str] = []
        self._extent: tuple[int, ...] = ()  # (t, h, w) or (h, w) of the latents seen last
        self.configure_optimizers()

    def _to_train(self, modules: dict[str, nn.Module], names: list[str]) -> nn.ModuleDict:
        """What checkpoints, averages and the optimiser hold."""
        for name in names:
            if name not in modules:
                raise UserError(f"task: the pipeline has no network {name!r} to train.{nearest(name, modules)}")
            if name != self.family.denoiser and not name.startswith("text_encoder"):
                raise UserError(f"task: {name!r} is neither the denoiser nor a text encoder; remove it from train")
        return nn.ModuleDict({name: modules[name].requires_grad_(True).train() for name in names})

    @property
    def denoiser(self) -> nn.Module:
        """The part that predicts."""
        return getattr(self.pipe, self.family.denoiser)

    def setup(self, stage: str) -> None:
        """Let the data encode images once, and captions for text encoders that stay as they are, if the recipe asks."""
        if self.trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
            raise UserError(f"task: precision {self.trainer.precision} is not supported; take bf16-mixed or 32-true")
        data: Any = self.trainer.datamodule  # pyright: ignore
        if hasattr(data, "check_captions"):
            data.check_captions()
        if stage == "fit" and getattr(data, "cache", 0):
            for part in self.frozen:
                part.to(self.trainer.strategy.root_device)
            texts = [] if self._learns_text else self._texts
            data.encode(self.encode_images, digest(self.pipe.vae, *texts), self.encode_captions if texts else None)

    def on_fit_start(self) -> None:
        """Frozen parts are no children of this module, so that checkpoints stay small; they follow it here."""
        for part in self.frozen:
            part.to(self.device)

    def encode_images(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What `data.latents` keeps of a batch {"image": (b, 3, h, w) in [0, 1]}."""
        with torch.no_grad():
            vae = self.pipe.vae
            with torch.autocast(self.device.type, enabled=False):  # noise schedules drown in the 8 bits of bf16
                return {"latents": to_latents(vae, batch["image"].to(vae.device, vae.dtype)).float()}

    def encode_captions(self, captions: list[str]) -> Context:
        """What `data.latents` keeps of captions: all of the context that differs from caption to caption."""
        with torch.no_grad():
            context = self.family.encode(self.pipe, captions)
        # Flux's places of text tokens, say, have no row per caption.
        return {name: tensor for name, tensor in context.items() if len(self._empty[name]) == 1}

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of one batch {"latents" or "image", "caption", "number"}."""
        torch.manual_seed(seed_of(self.seed, "network", self.global_step, batch_idx, self.global_rank))
        loss = self._loss(batch, self.drop_caption).mean()
        self.log("train/loss", loss.detach())
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the losses of the validation before."""
        self._losses, self._captions = [], []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss on unseen captions; noise and timesteps follow from the samples' numbers."""
        self._losses.append(self._loss(batch, 0.0))
        self._captions += batch["caption"]

    def on_validation_epoch_end(self) -> None:
        """Log means over all samples, of which each rank sees all."""
        if self._losses:
            self.log("val/loss", torch.cat(self._losses).mean())
        captions = self._captions[: self.adherence]
        try:
            scenes = [parse(caption) for caption in captions]
        except UserError as error:
            raise UserError(f"task: adherence needs captions of shapes world ({error}); set adherence: 0") from error
        if not captions or self.trainer.sanity_checking:
            return
        images = self.sample(captions, [seed_of(self.seed, "adherence", n) for n in range(len(captions))])
        right = [judge(image, scene).all for image, scene in zip(images, scenes, strict=True)]
        self.log("val/adherence", sum(right) / len(right))
        for things in sorted({len(scene.things) for scene in scenes}):
            some = [hit for hit, scene in zip(right, scenes, strict=True) if len(scene.things) == things]
            self.log(f"val/adherence_{things}", sum(some) / len(some))

    def _loss(self, batch: Mapping[str, Any], drop: float) -> Tensor:
        """Weighted squared error of the prediction, one value per sample, (b,)."""
        latents = self._latents(batch)
        given = self.noising(latents, batch["number"])
        context = self._context(batch, (given.luck < drop).tolist())
        predicted = self.family.predict(self.denoiser, given.latents, given.timestep, context)
        return given.weight * (predicted.float() - given.target.float()).square().flatten(1).mean(1)

    def _latents(self, batch: Mapping[str, Any]) -> Tensor:
        """Clean latents of a batch, float32."""
        latents = batch["latents"] if "latents" in batch else self.encode_images(batch)["latents"]
        self._extent = tuple(latents.shape[2:])
        return latents.to(self.device).float()

    @property
    def _texts(self) -> list[Any]:
        """Text encoders and tokenizers."""
        return [v for k, v in self.pipe.components.items() if k.startswith(("text_encoder", "tokenizer")) and v]

    @property
    def _learns_text(self) -> bool:
        return any(name.startswith("text_encoder") for name in self.trained)

    @cached_property
    def _empty(self) -> Context:
        """The empty caption, for frozen text encoders."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return self.family.encode(self.pipe, [""])

    def _context(self, batch: Mapping[str, Any], dropped: list[bool]) -> Context:
        """What conditions the denoiser: encoded captions of the data where they have them, else encoded now."""
        stored = {name.partition(".")[2]: value for name, value in batch.items() if name.startswith("context.")}
        if stored:
            gone = torch.tensor(dropped, device=self.device)
            empty = {name: value.to(self.device) for name, value in self._empty.items()}
            for name, value in stored.items():
                some = gone.view(-1, *[1] * (value.ndim - 1))
                empty[name] = torch.where(some, empty[name], value.to(empty[name]))
            return empty
        captions = ["" if gone else caption for caption, gone in zip(batch["caption"], dropped, strict=True)]
        with torch.set_grad_enabled(self._learns_text and torch.is_grad_enabled()):
            return self.family.encode(self.pipe, captions)

    def pictures(self, batches: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Samples of the fixed prompts, each with its own fixed seed.

        Args:
            batches: of validation; their captions are the prompts where the recipe gives none.
            count: how many prompts.
        """
        prompts = (self.prompts or [caption for batch in batches for caption in batch["caption"]])[:count]
        if not prompts:
            return
        images = self.sample(prompts, [seed_of(self.seed, "preview", n) for n in range(len(prompts))])
        yield "samples", media.grid(images, prompts, title=f"{self.protocol}")

    def sample(self, prompts: list[str], seeds: list[int]) -> list[np.ndarray]:
        """One picture per prompt, or some frames of a clip side by side; float (h, w, 3) in [0, 1], 32 at once."""
        if len(prompts) > 32:
            return self.sample(prompts[:32], seeds[:32]) + self.sample(prompts[32:], seeds[32:])
        self.pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        settings = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "output_type": "np"}
        if self.family.clips and self._extent:  # of the size that is trained: the pipeline's own may take hours
            t, h, w = self._extent
            frames = (t - 1) * self.pipe.vae_scale_factor_temporal + 1
            scale = self.pipe.vae_scale_factor_spatial
            settings |= {"num_frames": frames, "height": h * scale, "width": w * scale}
        with evaluating(self.trained):
            out = self.pipe(prompts, generator=generators, **settings)
        return [media.strip(clip) for clip in out.frames] if self.family.clips else list(out.images)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over all trained parts and its schedule, both as the recipe says."""
        return configured(self.trained.parameters(), self.optimizer_spec, self.schedule_spec)

    def export(self, folder: Path) -> Path:
        """Write a diffusers folder `pipeline`, which `zoo sample --pipeline` and plain diffusers load.

        Args:
            folder: where `pipeline` is put.
        """
        fill = lambda place: save_pipeline(self.pipe, place, self.steps, self.guidance)
        return write_folder(folder / "pipeline", fill)
