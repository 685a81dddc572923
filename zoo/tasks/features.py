"""Training of feature networks: to tell what a scene of shapes world holds, and how blurred and how noisy it is."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from zoo import media, models
from zoo.data.blur import filter2d, gaussian_kernel
from zoo.data.images import to_array
from zoo.data.sampler import seed_of
from zoo.errors import UserError
from zoo.models.weights import write_weights
from zoo.scene import BACKGROUNDS, COLOURS, MOST, RELATIONS, SHAPES, SIZES, TEXTURES, Scene, parse
from zoo.tasks.optimizers import configured

FACTS = [  # what may be true of a scene: the group, then what it says
    *product(["shape"], COLOURS, SHAPES),
    *product(["size"], COLOURS, SIZES),
    *product(["texture"], COLOURS, TEXTURES),
    *product(["relation"], COLOURS, RELATIONS),
    *product(["count"], map(str, range(1, MOST + 1))),
    *product(["background"], BACKGROUNDS),
]
GROUPS = tuple(dict.fromkeys(fact[0] for fact in FACTS))
_PLACE = {fact: place for place, fact in enumerate(FACTS)}
_BLUR, _NOISE = 2.0, 0.25  # the strongest: standard deviations, pixels and shares of the value range
_KERNEL = 11  # pixels


class FeatureTask(LightningModule):
    """Trains a feature network with a linear layer on it, which is thrown away, to tell what is in a picture.

    For every colour: which shapes, sizes and textures things of it have, and how they lie to their neighbours; beside
    that the count and the background, and of spoilt pictures how strongly they were blurred and noised. So features
    keep whatever a bad generator gets wrong. It logs train/loss, train/damage (the squared error of blur and noise, of
    strengths in [0, 1]), and after each validation the share of pictures of which all is right that a group of FACTS
    says, val/GROUP, and val/accuracy, the mean over the groups.

    Args:
        network: name of a variant, or a mapping with `family` or `variant` and constructor keywords.
        optimizer: as for RestorationTask.
        schedule: as for RestorationTask.
        spoilt: share of the training pictures that are blurred, and likewise noised.
        seed: of blur and noise.

    Raises:
        UserError: a network for something else, or a share outside 0 to 1.
    """

    protocol = "share of unseen pictures of which all is right, by group"

    def __init__(
        self,
        *,
        network: str | dict[str, Any],
        optimizer: dict[str, Any],
        schedule: dict[str, Any] | None = None,
        spoilt: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= spoilt <= 1:
            raise UserError(f"task: spoilt must be a share in 0 to 1, got {spoilt}")
        self.save_hyperparameters(
            {"network": network, "optimizer": optimizer, "schedule": schedule, "spoilt": spoilt, "seed": seed},
            logger=False,
        )
        self.network = models.create(network).train()
        family = models.family_of(self.network)
        if models.FAMILIES[family].task != "features":
            raise UserError(f"task: {family!r} is no feature network; give network: shapes-features")
        self.head = nn.Linear(self.network.num_features, len(FACTS) + 2)  # pyright: ignore (a feature network)
        self.optimizer_spec, self.schedule_spec = optimizer, schedule
        self.spoilt, self.seed = spoilt, seed
        self._right: list[Tensor] = []
        self.configure_optimizers()

    def setup(self, stage: str) -> None:
        """Refuse data that show less than they tell of."""
        data: Any = self.trainer.datamodule  # pyright: ignore
        if hasattr(data, "check_captions"):
            data.check_captions()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of FACTS (b, facts), and strengths of blur and noise (b, 2), of images (b, c, h, w) in [0, 1]."""
        out = self.head(self.network(image))
        return out[:, :-2], out[:, -2:]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of one batch {"image": (b, c, h, w) in [0, 1], "scene": list of str, "number": (b,)}."""
        image, strength = self.spoil(batch["image"], batch["number"])
        logits, guessed = self(image)
        damage = F.mse_loss(guessed, strength)
        loss = F.binary_cross_entropy_with_logits(logits, _truth(batch).to(logits)) + damage
        self.log_dict({"train/loss": loss.detach(), "train/damage": damage.detach()})
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def spoil(self, image: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Blur some images and add noise to some, by the numbers of their samples.

        Args:
            image: (b, c, h, w) in [0, 1].
            number: (b,).

        Returns:
            The images, and the strengths of blur and noise, (b, 2) in [0, 1]; 0 = left alone.
        """
        kernels, noise, strengths = [], [], []
        for n in number.tolist():
            generator = torch.Generator().manual_seed(seed_of(self.seed, "spoil", n))
            luck, strength = torch.rand(2, 2, generator=generator)
            strength = torch.where(luck < self.spoilt, strength, 0.0)
            blur, level = strength.tolist()
            kernels.append(gaussian_kernel(_KERNEL, max(_BLUR * blur, 0.01)))
            noise.append(_NOISE * level * torch.randn(image.shape[1:], generator=generator))
            strengths.append(strength)
        blurred = filter2d(image, torch.stack(kernels))
        return (blurred + torch.stack(noise).to(image)).clamp(0, 1), torch.stack(strengths).to(image)

    def on_validation_epoch_start(self) -> None:
        """Forget the scores of the validation before."""
        self._right = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """See which facts are told rightly of one batch of whole images."""
        said = self(batch["image"])[0] > 0
        self._right.append(said.cpu() == _truth(batch).bool())

    def on_validation_epoch_end(self) -> None:
        """Log shares of the images, of which each rank sees all."""
        if not self._right:
            return
        right = torch.cat(self._right)  # images facts
        places = {group: [n for n, fact in enumerate(FACTS) if fact[0] == group] for group in GROUPS}
        shares = {group: right[:, place].all(1).float().mean() for group, place in places.items()}
        self.log_dict({f"val/{group}": share for group, share in shares.items()})
        self.log("val/accuracy", torch.stack(list(shares.values())).mean())

    def pictures(self, batches: Sequence[Mapping[str, Any]], count: int) -> Iterator[tuple[str, np.ndarray]]:
        """Unseen pictures with the first thing that is told wrongly of each.

        Args:
            batches: of validation.
            count: how many images.
        """
        if not batches:
            return
        batch = batches[0]
        images = batch["image"][:count]
        with torch.no_grad():
            said = self(images.to(self.device))[0].cpu() > 0
        labels = []
        for guess, truth in zip(said, _truth(batch).bool(), strict=False):
            wrong = [f"{'not ' * bool(truth[n])}{' '.join(FACTS[n][1:])}" for n in (guess != truth).nonzero()[:, 0]]
            labels.append(f"{len(wrong)} wrong: {wrong[0]}" if wrong else "all right")
        yield "facts", media.grid([to_array(image) for image in images], labels, columns=min(4, len(images)))

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser over all parameters and its schedule, both as the recipe says."""
        return configured(self.parameters(), self.optimizer_spec, self.schedule_spec)

    def export(self, folder: Path) -> Path:
        """Write weights.safetensors, which `zoo.load` and `zoo.metrics.fid` read, into `folder`."""
        return write_weights(folder / "weights.safetensors", self.network, force=True)


def facts_of(scene: Scene) -> set[tuple[str, ...]]:
    """Those of FACTS that are true.

    Args:
        scene: one that leaves nothing open.
    """
    found = {("count", str(len(scene.things))), ("background", str(scene.background))}
    for thing in scene.things:
        found |= {(group, str(thing.colour), str(getattr(thing, group))) for group in ("shape", "size", "texture")}
    for told in (scene, scene.mirrored()):  # A left of B, B right of A
        pairs = zip(told.things, told.relations, strict=False)
        found |= {("relation", str(thing.colour), relation) for thing, relation in pairs}
    return found


def _truth(batch: Mapping[str, Any]) -> Tensor:
    """Which of FACTS are true of each image, 0 or 1, (b, facts)."""
    if "scene" not in batch:
        raise UserError("task: these data do not tell what is in a picture; set data.init_args.source=shapes")
    truth = torch.zeros(len(batch["scene"]), len(FACTS))
    for row, text in zip(truth, batch["scene"], strict=True):
        row[[_PLACE[fact] for fact in facts_of(parse(text))]] = 1
    return truth
