"""Training of restorers: degraded image in, restored image out, any network, any sum of objectives."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from zoo import media, models
from zoo.data.images import to_array
from zoo.data.imresize import enlarged
from zoo.data.sampler import seed_of
from zoo.errors import UserError
from zoo.metrics.psnr_ssim import Protocol
from zoo.models.weights import write_weights
from zoo.pipelines import tiling
from zoo.tasks.objectives import Objective
from zoo.tasks.optimizers import configured

log = logging.getLogger(__name__)


class RestorationTask(LightningModule):
    """Trains a restorer on pairs and validates it on whole images, beside plain resizing of its input.

    It logs train/loss, train/lr, each objective's unweighted value where there are several, and after each validation
    for each set val/SET/psnr_y (val/SET/psnr without `y_channel`), val/SET/psnr_y_bicubic (the same of the enlarged
    input; psnr_y_input where sizes are equal), and val/psnr_y, the mean over sets.

    Args:
        network: name of a variant, or a mapping with `family` or `variant` and constructor keywords.
        objectives: what is minimised; their weighted sum is the loss.
        optimizer: class_path and init_args of an optimiser of torch.optim.
        schedule: the same for a schedule of torch.optim.lr_scheduler or WarmupCosine, stepped every optimisation step;
            None keeps the learning rate.
        weights: file, run folder or variant to start from; tensors that do not fit stay random and are listed.
        crop_border: border that validation leaves out, pixels of gt.
        y_channel: validate on the luma channel.
        seed: of what the network draws in training, such as dropout.

    Raises:
        UserError: an unknown name or keyword, no objective, or weights of which nothing fits.
    """

    def __init__(
        self,
        *,
        network: str | dict[str, Any],
        objectives: list[Objective],
        optimizer: dict[str, Any],
        schedule: dict[str, Any] | None = None,
        weights: str | None = None,
        crop_border: int = 0,
        y_channel: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not objectives:
            raise UserError("task: objectives is empty; give at least one, such as L1")
        if crop_border < 0:
            raise UserError(f"task: crop_border must be at least 0, got {crop_border}")
        # Plain data only: torch.load(weights_only=True) refuses a checkpoint with an object of ours inside.
        self.save_hyperparameters(
            {
                "network": network,
                "objectives": [objective.settings() for objective in objectives],
                "optimizer": optimizer,
                "schedule": schedule,
                "weights": weights,
                "crop_border": crop_border,
                "y_channel": y_channel,
                "seed": seed,
            },
            logger=False,
        )
        self.network = models.create(network).train()
        if weights is not None:
            start_from(self.network, weights)
        self.objectives = nn.ModuleList(objectives)
        self.optimizer_spec = optimizer
        self.schedule_spec = schedule
        self.protocol = Protocol(crop_border, y_channel)
        self.seed = seed
        self._scores: dict[
            str, list[tuple[float, float]]
        ] = {}  # set -> PSNR of the network and of its input, per image
        self._baseline: dict[tuple[str, str], float] = {}
        RestorationTask.configure_optimizers(self)  # mistakes in the two mappings show before data is read

    def agree(self, data: object) -> None:
        """Compare the network with data whose pictures it shall restore.

        Args:
            data: a datamodule; its `upscale` and `channels` count where it has them.

        Raises:
            UserError: they differ.
        """
        asked = models.needs(self.network)
        for key, keyword, wanted in (
            ("upscale", "upscale", asked.upscale),
            ("channels", "in_chans", asked.in_channels),
        ):
            given = getattr(data, key, wanted)
            if given != wanted:
                raise UserError(
                    f"data have {key} {given}, but the network has {keyword} {wanted}; "
                    f"set data.init_args.{key}={wanted}, or {keyword}: {given} in model.init_args.network"
                )

    def setup(self, stage: str | None = None) -> None:
        """Compare network and data before either is used; see `agree`."""
        self.agree(self.trainer.datamodule)  # pyright: ignore

    def forward(self, lq: Tensor) -> Tensor:
        """Restore images (b, c, h, w) in [0, 1] whose sides suit the network; not clamped."""
        return self.network(lq)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor | None:
        """The loss of one batch of crops {"lq": (b, c, h, w), "gt": (b, c, h * upscale, w * upscale)}."""
        loss, _ = self.compare(batch, batch_idx)
        self.log("train/loss", loss.detach())
        return loss

    def compare(self, batch: Mapping[str, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Restore one batch of crops: the weighted sum of the objectives, and the restored images."""
        # What the network draws depends on the step alone, so that neither a restart nor a validation changes it.
        torch.manual_seed(seed_of(self.seed, "network", self.global_step, batch_idx, self.global_rank))
        restored = self.network(batch["lq"])
        parts = [objective(restored, batch["gt"]) for objective in self.objectives]
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        if len(parts) > 1:
            for name, part in zip(_names(self.objectives), parts, strict=True):
                self.log(f"train/{name}", part.detach())
        return torch.stack([o.weight * part for o, part in zip(self.objectives, parts, strict=True)]).sum(), restored

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the validation before."""
        self._scores = {}

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one whole image {"lq": (1, c, h, w), "gt": (1, c, H, W), "name", "set"}."""
        group, lq, gt = batch["set"], batch["lq"], batch["gt"]
        restored = tiling.restore(self.network, lq)
        key = (group, batch["name"])
        if key not in self._baseline:
            self._baseline[key] = self.protocol.psnr(enlarged(lq, gt.shape[-1] // lq.shape[-1]), gt)
        self._scores.setdefault(group, []).append((self.protocol.psnr(restored, gt), self._baseline[key]))

    def on_validation_epoch_end(self) -> None:
        """Log the mean of every set over its images, of which each rank sees all."""
        metric = "psnr_y" if self.protocol.y_channel else "psnr"
        plain = f"{metric}_bicubic" if models.needs(self.network).upscale != 1 else f"{metric}_input"
        means = []
        for group, pairs in sorted(self._scores.items()):
            reached, before = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            self.log_dict({f"val/{group}/{metric}": reached, f"val/{group}/{plain}": before}, add_dataloader_idx=False)
            means.append(reached)
        if means:
            self.log(f"val/{metric}", sum(means) / len(means))

    def pictures(self, batches: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Each image enlarged, restored and true, with names for their files.

        Args:
            batches: of validation.
            count: how many images.
        """
        for image in batches[:count]:
            lq, gt = (image[key].to(self.device) for key in ("lq", "gt"))
            before, restored = enlarged(lq, gt.shape[-1] // lq.shape[-1]), tiling.restore(self.network, lq).to(gt)
            scores = [self.protocol.psnr(candidate, gt) for candidate in (before, restored)]
            plain = "input" if lq.shape == gt.shape else "bicubic"
            labels = [f"{plain} {scores[0]:.2f} dB", f"restored {scores[1]:.2f} dB", "truth"]
            arrays = [to_array(candidate[0]) for candidate in (before, restored, gt)]
            title = f"{image['set']} / {image['name']}, step {self.global_step}   ({self.protocol})"
            yield _file_name(image), media.side_by_side(arrays, labels, title=title)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over all trainable parameters and its schedule, both as the recipe says.

        The length of the training stands in the recipe: asking the trainer for it would make Lightning forget the
        position of the data when it resumes (Lightning-AI/pytorch-lightning#20550).
        """
        return configured(
            [p for p in self.network.parameters() if p.requires_grad], self.optimizer_spec, self.schedule_spec
        )

    def export(self, folder: Path) -> Path:
        """Write weights.safetensors, which `zoo.load` and `zoo restore` read, into `folder`."""
        return write_weights(folder / "weights.safetensors", self.network, force=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which network the weights belong to, so that `zoo.load` reads the file without Lightning."""
        checkpoint["zoo"] = {
            "arch": models.family_of(self.network),
            "config": self.network.config,
            "variant": self.network.variant,
            "version": 1,
        }


def _file_name(image: Mapping[str, Any]) -> str:
    """Set and image; sets may hold images of the same name, and names may hold folders."""
    name = image["name"].replace("/", "-")
    ending = next((suffix for suffix in media.IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    return f"{image['set']}-{name[: len(name) - len(ending)]}"


def start_from(network: nn.Module, source: str) -> None:
    """Copy what fits of other weights into `network`, and list what does not.

    Args:
        network: the network to fill.
        source: file, run folder or variant, as for `zoo.load`.

    Raises:
        FileNotFoundError: no such weights.
        UserError: the weights are of another family, or nothing fits.
    """
    with torch.device("cpu"):  # also where the network itself is only sketched on the meta device
        other = models.load(source)
    if type(other) is not type(network):
        families = models.family_of(other), models.family_of(network)
        raise UserError(f"weights {source!r} are of {families[0]!r}, the network is {families[1]!r}; give fitting ones")
    given = other.state_dict()
    # Integer tensors are index tables: they follow from the architecture, which may differ here.
    own = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    taken = {name: given[name] for name, old in own.items() if name in given and given[name].shape == old.shape}
    if not taken:
        raise UserError(f"weights {source!r}: no tensor fits, every size differs; give weights of this size")
    if not any(tensor.is_meta for tensor in own.values()):
        network.load_state_dict(taken, strict=False)
    left = [name for name in own if name not in taken]
    if left:
        shown = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        log.warning("weights %s: %d of %d tensors taken; these stay random: %s", source, len(taken), len(own), shown)
    else:
        log.info("weights %s: all %d tensors taken", source, len(taken))


def _names(objectives: Iterable[nn.Module]) -> list[str]:
    """Lower-case class names, numbered where one occurs twice."""
    names = [type(o).__name__.lower() for o in objectives]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
