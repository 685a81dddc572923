"""How noisy a training sample becomes, and what a denoiser is to say about it.

Noise, place in time and the luck that decides about the caption follow from (seed, number of the sample in the run), so
that neither workers nor ranks nor a resumed run change them, and a teacher and its student meet the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.data.sampler import seed_of
from zoo.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # of schedulers that are no flows


class Noised(NamedTuple):
    """A batch as a denoiser gets it.

    Attributes:
        latents: with noise, in the shape of the clean ones.
        timestep: (b,), as the scheduler counts; 0 to 1000 for flows.
        target: what the denoiser should answer.
        weight: of the squared error, (b,).
        luck: in [0, 1), (b,); captions whose luck is below the share to drop are dropped.
    """

    latents: Tensor
    timestep: Tensor
    target: Tensor
    weight: Tensor
    luck: Tensor


class Noising(nn.Module):
    """Adds noise as a scheduler of diffusers takes it away; the target follows from its config.

    Args:
        scheduler: that the pipeline samples with.
        timesteps: "uniform", or "logit_normal" (Esser et al. 2024).
        min_snr_gamma: bound of the signal-to-noise ratio in the weight of a timestep (Hang et al. 2023); None = all
            timesteps count alike.
        seed: of everything that is drawn.

    Raises:
        UserError: settings that contradict the scheduler, or one that cannot be trained for.
    """

    alphas: Tensor  # cumulative, of schedulers that are not flows

    def __init__(
        self,
        scheduler: Any,  # noqa: ANN401
        *,
        timesteps: str = "uniform",
        min_snr_gamma: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if timesteps not in ("uniform", "logit_normal"):
            raise UserError(f"task: timesteps must be uniform or logit_normal, got {timesteps!r}")
        config = scheduler.config
        self.timesteps, self.min_snr_gamma, self.seed = timesteps, min_snr_gamma, seed
        self.prediction = getattr(config, "prediction_type", "flow_prediction")
        self.is_flow = hasattr(scheduler, "scale_noise") or self.prediction == "flow_prediction"
        if not self.is_flow and self.prediction not in PREDICTIONS:
            raise UserError(f"task: prediction_type {self.prediction!r} of the scheduler cannot be trained")
        if self.is_flow and min_snr_gamma is not None:
            raise UserError("task: min_snr_gamma has no meaning for a flow-matching scheduler; remove it")
        self.shift = getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0
        if not self.is_flow:
            self.register_buffer("alphas", scheduler.alphas_cumprod.clone().float(), persistent=False)

    def forward(self, latents: Tensor, numbers: Tensor) -> Noised:
        """Add noise.

        Args:
            latents: clean, (b, ...), float32.
            numbers: of the samples in the run, (b,).
        """
        draws = [self.draw(int(number), latents.shape[1:]) for number in numbers]
        noise = torch.stack([noise for noise, _, _ in draws]).to(latents)
        share, luck = (torch.tensor([draw[place] for draw in draws]).to(latents) for place in (1, 2))
        wide = (-1,) + (1,) * (latents.ndim - 1)
        if self.is_flow:
            sigma = (self.shift * share / (1 + (self.shift - 1) * share)).view(wide)
            noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
            return Noised(noisy, 1000 * sigma.flatten(), target, torch.ones_like(share), luck)
        count = len(self.alphas)
        timestep = (share * count).long().clamp(max=count - 1)
        alpha = self.alphas[timestep].to(latents).view(wide)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = signal * latents + spread * noise
        velocity = signal * noise - spread * latents
        target = {"epsilon": noise, "v_prediction": velocity, "sample": latents}[self.prediction]
        return Noised(noisy, timestep, target, self.weight(alpha.flatten()), luck)

    def draw(self, number: int, shape: torch.Size | tuple[int, ...]) -> tuple[Tensor, float, float]:
        """Noise, place in time in [0, 1), and luck of one sample."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, "noise", number))
        share, luck = torch.rand(2, generator=generator).tolist()
        if self.timesteps == "logit_normal":
            share = torch.sigmoid(torch.randn((), generator=generator)).item()
        return torch.randn(shape, generator=generator), share, luck

    def weight(self, alpha: Tensor) -> Tensor:
        """Min-SNR weights in terms of the prediction; at zero signal an epsilon tells nothing and counts nothing."""
        if self.min_snr_gamma is None:
            return torch.ones_like(alpha)
        ratio = alpha / (1 - alpha)
        bounded = ratio.clamp(max=self.min_snr_gamma)
        if self.prediction == "v_prediction":
            return bounded / (ratio + 1)
        return bounded if self.prediction == "sample" else bounded / ratio.clamp(min=1e-8)
