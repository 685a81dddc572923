"""Training of small autoencoders of diffusers: image -> latents -> image, with their own reconstruction figures."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo import media
from zoo.data.images import to_array
from zoo.data.sampler import seed_of
from zoo.errors import UserError
from zoo.files import write_folder
from zoo.metrics.prompt import judge
from zoo.metrics.psnr_ssim import Protocol
from zoo.scene import parse
from zoo.tasks.objectives import Objective
from zoo.tasks.optimizers import configured

log = logging.getLogger(__name__)


class AutoencoderTask(LightningModule):
    """Trains an AutoencoderKL: objectives between image and reconstruction, and a light pull of latents to N(0, 1).

    It logs train/loss, train/kl and each objective, and after each validation val/psnr of the reconstructions and, for
    captioned scenes of shapes world, val/adherence: the share that still shows what its caption says.

    Args:
        autoencoder: keywords of diffusers' AutoencoderKL.
        objectives: what is minimised between reconstruction and image, both in [0, 1].
        optimizer: as for RestorationTask.
        schedule: as for RestorationTask.
        kl_weight: of the mean over latents of the divergence from N(0, 1).
        seed: of the noise on the latents.

    Raises:
        UserError: keywords that AutoencoderKL refuses, or no objective.
    """

    moments: Tensor  # mean and mean square of the latents, from which the scaling factor follows

    def __init__(
        self,
        *,
        autoencoder: dict[str, Any],
        objectives: list[Objective],
        optimizer: dict[str, Any],
        schedule: dict[str, Any] | None = None,
        kl_weight: float = 1e-6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not objectives:
            raise UserError("task: objectives is empty; give at least one, such as L1")
        if not 0 <= kl_weight < math.inf:
            raise UserError(f"task: kl_weight must be a number >= 0, got {kl_weight}")
        self.save_hyperparameters(
            {
                "autoencoder": autoencoder,
                "objectives": [objective.settings() for objective in objectives],
                "optimizer": optimizer,
                "schedule": schedule,
                "kl_weight": kl_weight,
                "seed": seed,
            },
            logger=False,
        )
        try:
            self.network: Any = AutoencoderKL(**autoencoder)
        except (TypeError, ValueError) as error:
            raise UserError(f"task: AutoencoderKL refuses autoencoder: {error}") from error
        self.objectives = nn.ModuleList(objectives)
        self.optimizer_spec, self.schedule_spec = optimizer, schedule
        self.kl_weight, self.seed = kl_weight, seed
        self.protocol = Protocol()
        self.register_buffer("moments", torch.tensor([0.0, 1.0]))
        self._scores: list[tuple[float, bool | None]] = []
        self.configure_optimizers()

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct images (b, c, h, w) in [0, 1] from the means of their latents."""
        latents = self.network.encode(image * 2 - 1).latent_dist.mode()
        return self.network.decode(latents).sample / 2 + 0.5

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch {"image": (b, c, h, w) in [0, 1]}."""
        image = batch["image"]
        posterior = self.network.encode(image * 2 - 1).latent_dist
        # Of each sample's number alone, so that neither batch nor rank changes it.
        seeds = [seed_of(self.seed, "latents", int(number)) for number in batch["number"]]
        draws = [torch.randn(posterior.mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise = torch.stack(draws).to(posterior.mean)
        latents = posterior.mean + posterior.std * noise  # b c h w
        restored = self.network.decode(latents).sample / 2 + 0.5
        with torch.no_grad():
            seen = torch.stack([latents.mean(), latents.square().mean()]).float()
            self.moments.lerp_(seen, 0.01)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        parts = [objective(restored, image) for objective in self.objectives]
        loss = torch.stack([o.weight * part for o, part in zip(self.objectives, parts, strict=True)]).sum()
        loss = loss + self.kl_weight * kl
        self.log_dict({"train/loss": loss.detach(), "train/kl": kl.detach()})
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the validation before."""
        self._scores = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one batch of whole images."""
        restored = self(batch["image"]).clamp(0, 1)
        for image, back, caption in zip(batch["image"], restored, batch["caption"], strict=True):
            self._scores.append((self.protocol.psnr(back, image), _adheres(back, caption)))

    def on_validation_epoch_end(self) -> None:
        """Log means over the images."""
        if not self._scores:
            return
        values, kept = zip(*self._scores, strict=True)
        self.log("val/psnr", sum(values) / len(values))
        known = [value for value in kept if value is not None]
        if known:
            self.log("val/adherence", sum(known) / len(known))

    def pictures(self, batches: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Images above their reconstructions.

        Args:
            batches: of validation.
            count: how many images.
        """
        if not batches:
            return
        batch = batches[0]
        images = batch["image"][:count].to(self.device)
        with torch.no_grad():
            restored = self(images).clamp(0, 1)
        labels = [f"{self.protocol.psnr(back, image):.2f} dB" for back, image in zip(restored, images, strict=True)]
        sheet = [to_array(image) for image in [*images, *restored]]
        yield "reconstructions", media.grid(sheet, [*batch["caption"][: len(images)], *labels], columns=len(images))

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over all parameters and its schedule, both as the recipe says."""
        return configured(self.network.parameters(), self.optimizer_spec, self.schedule_spec)

    def export(self, folder: Path) -> Path:
        """Write a diffusers folder `vae`, with the scaling factor that gives its latents unit variance.

        Args:
            folder: where `vae` is put.
        """
        mean, square = self.moments.tolist()
        self.network.register_to_config(scaling_factor=round((square - mean**2) ** -0.5, 4))
        return write_folder(folder / "vae", self.network.save_pretrained)


def _adheres(image: Tensor, caption: str) -> bool | None:
    """Whether an image (3, h, w) still shows its caption; None where that is no caption of shapes world."""
    try:
        return judge(to_array(image), parse(caption)).all
    except UserError:
        return None
