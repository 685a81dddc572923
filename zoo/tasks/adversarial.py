"""Training of restorers against a discriminator that learns to tell their pictures from true ones."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from zoo.errors import UserError
from zoo.layers.discriminators import UNetDiscriminatorSN
from zoo.tasks.objectives import Objective
from zoo.tasks.optimizers import configured
from zoo.tasks.restoration import RestorationTask

_PRECISIONS = ("32-true", "64-true", "bf16-mixed")


class AdversarialTask(RestorationTask):
    """`RestorationTask` with a discriminator D: for each batch a step of the restorer, then one of D.

    The restorer minimises its objectives + adversarial * softplus(-D(restored)), D softplus(-D(gt)) +
    softplus(D(restored)), means over all logits. What is validated, averaged and written is the restorer. Beside what
    RestorationTask logs: train/adversarial (the restorer's last term, unweighted), train/discriminator, and train/real
    and train/fake, the mean logits.

    Args:
        network: as for RestorationTask.
        objectives: as for RestorationTask.
        optimizer: as for RestorationTask.
        schedule: as for RestorationTask.
        weights: of the restorer, as for RestorationTask; a run without a discriminator is where to start.
        crop_border: as for RestorationTask.
        y_channel: as for RestorationTask.
        seed: as for RestorationTask.
        adversarial: weight of what D says.
        discriminator: keywords of `UNetDiscriminatorSN`.
        discriminator_optimizer: of D; None = as `optimizer`.
        discriminator_schedule: of D; None = as `schedule`.

    Raises:
        UserError: what RestorationTask refuses, a weight that is not positive, or an unknown keyword of D.

    Source: Wang et al. 2021 (Real-ESRGAN), section 3; xinntao/Real-ESRGAN, realesrgan/models/realesrgan_model.py.
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
        adversarial: float = 0.1,
        discriminator: dict[str, Any] | None = None,
        discriminator_optimizer: dict[str, Any] | None = None,
        discriminator_schedule: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            network=network,
            objectives=objectives,
            optimizer=optimizer,
            schedule=schedule,
            weights=weights,
            crop_border=crop_border,
            y_channel=y_channel,
            seed=seed,
        )
        if not adversarial > 0:
            raise UserError(f"task: adversarial must be positive, got {adversarial}; without it take RestorationTask")
        own = {
            "adversarial": adversarial,
            "discriminator": discriminator,
            "discriminator_optimizer": discriminator_optimizer,
            "discriminator_schedule": discriminator_schedule,
        }
        self.save_hyperparameters(own, logger=False)
        self.adversarial = adversarial
        self.rival_specs = discriminator_optimizer or optimizer, discriminator_schedule or schedule
        try:
            self.discriminator = UNetDiscriminatorSN(**discriminator or {})
        except TypeError as error:
            raise UserError(f"task: discriminator: {error}; it takes num_in_ch, num_feat, skip_connection") from error
        self.automatic_optimization = False
        configured(self.discriminator.parameters(), *self.rival_specs)

    def setup(self, stage: str | None = None) -> None:
        """As RestorationTask; and refuse a precision whose gradients are scaled for one optimiser."""
        if self.trainer.precision not in _PRECISIONS:
            given, known = self.trainer.precision, ", ".join(_PRECISIONS)
            raise UserError(
                f"task: precision {given} does not suit two optimisers; set trainer.precision to one of {known}"
            )
        super().setup(stage)

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Both steps for one batch {"lq", "gt"}, as RestorationTask has it."""
        self.discriminator.requires_grad_(False)
        loss, restored = self.compare(batch, batch_idx)
        fooled = F.softplus(-self.discriminator(restored)).mean()
        loss = loss + self.adversarial * fooled
        own, _ = self.optimizers()  # pyright: ignore
        own.zero_grad()
        self.manual_backward(loss)
        own.step()

        self.discriminator.requires_grad_(True)
        # Lightning counts each step of the optimisers that it wraps, and would end the training half way.
        rival = self.trainer.optimizers[1]
        rival.zero_grad()
        real = self.discriminator(batch["gt"])
        from_real = F.softplus(-real).mean()
        self.manual_backward(from_real)
        fake = self.discriminator(restored.detach())
        from_fake = F.softplus(fake).mean()
        self.manual_backward(from_fake)
        rival.step()
        for config in self.trainer.lr_scheduler_configs:
            config.scheduler.step()  # pyright: ignore

        self.log("train/loss", loss.detach())
        self.log("train/adversarial", fooled.detach())
        self.log("train/discriminator", (from_real + from_fake).detach())
        self.log("train/real", real.detach().mean())
        self.log("train/fake", fake.detach().mean())

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """Both optimisers with their schedules, the restorer's first."""
        return super().configure_optimizers(), configured(self.discriminator.parameters(), *self.rival_specs)
