"""Noise as the schedulers of diffusers take it away, the same for a sample everywhere."""

import diffusers
import pytest
import torch

from tests.helpers import error
from zoo.errors import UserError
from zoo.tasks.noising import Noising

NUMBERS = torch.tensor([3, 1000, 7])
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def ddim(prediction, **changes):
    return diffusers.DDIMScheduler(prediction_type=prediction, **changes)


@pytest.fixture
def latents():
    return torch.randn(3, 4, 2, 5, 6, generator=torch.Generator().manual_seed(0))  # clips: any number of axes goes


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_diffusers(prediction, latents):
    scheduler = ddim(prediction, **ZERO_SNR)
    noising = Noising(scheduler)
    given = noising(latents, NUMBERS)
    noise = torch.stack([noising.draw(int(number), latents.shape[1:])[0] for number in NUMBERS])
    assert error(given.latents, scheduler.add_noise(latents, noise, given.timestep)) < 1e-6
    velocity = scheduler.get_velocity(latents, noise, given.timestep)
    assert error(given.target, {"epsilon": noise, "v_prediction": velocity, "sample": latents}[prediction]) < 1e-6
    assert given.weight.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flows_shift_their_time_as_their_scheduler_does(shift, latents):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    noising = Noising(scheduler)
    given = noising(latents, NUMBERS)
    noise, share, _ = noising.draw(3, latents.shape[1:])
    sigma = shift * share / (1 + (shift - 1) * share)
    assert given.timestep[0].item() == pytest.approx(1000 * sigma)
    assert error(given.latents[0], (1 - sigma) * latents[0] + sigma * noise) < 1e-6
    assert error(given.target[0], noise - latents[0]) < 1e-6
    assert scheduler.sigmas[500].item() == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), abs=1e-3)


def test_what_is_drawn_follows_from_seed_and_number_alone(latents):
    noising = Noising(ddim("epsilon"))
    together = noising(latents, NUMBERS)
    for row in range(3):
        alone = noising(latents[row : row + 1], NUMBERS[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    other = Noising(ddim("epsilon"), seed=1)(latents, NUMBERS)
    assert not torch.equal(other.latents, together.latents)
    assert not torch.equal(other.timestep, together.timestep)


def test_luck_is_spread_evenly():
    noising = Noising(ddim("epsilon"))
    lucks = torch.tensor([noising.draw(number, (1,))[2] for number in range(2000)])
    assert 0.08 < (lucks < 0.1).float().mean() < 0.12


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_timesteps_cover_the_whole_range(kind):
    noising = Noising(ddim("epsilon"), timesteps=kind)
    shares = torch.tensor([noising.draw(number, (1,))[1] for number in range(500)])
    assert 0 <= shares.min() < 0.1
    assert 0.9 < shares.max() < 1
    middle = ((shares > 0.25) & (shares < 0.75)).float().mean()
    assert (middle > 0.6) == (kind == "logit_normal")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_the_paper(prediction):
    formula = {
        "epsilon": lambda snr: snr.clamp(max=5) / snr,
        "v_prediction": lambda snr: snr.clamp(max=5) / (snr + 1),
        "sample": lambda snr: snr.clamp(max=5),
    }[prediction]
    noising = Noising(ddim(prediction), min_snr_gamma=5.0)
    alpha = noising.alphas[[0, 100, 500, 999]]
    assert error(noising.weight(alpha), formula(alpha / (1 - alpha))) < 1e-6


def test_without_signal_an_epsilon_counts_nothing():
    noising = Noising(ddim("epsilon", **ZERO_SNR), min_snr_gamma=5.0)
    assert noising.weight(noising.alphas[-1:]).item() == pytest.approx(0, abs=1e-4)


def test_the_schedule_moves_with_the_task_and_stays_out_of_checkpoints():
    noising = Noising(ddim("epsilon"))
    assert not noising.state_dict()
    assert noising.to("meta").alphas.is_meta


@pytest.mark.parametrize(
    ("scheduler", "changes", "said"),
    [
        (ddim("noise"), {}, "prediction_type 'noise'"),
        (ddim("epsilon"), {"timesteps": "normal"}, "timesteps must be uniform or logit_normal"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), {"min_snr_gamma": 5.0}, "min_snr_gamma has no meaning"),
    ],
)
def test_settings_that_contradict_the_scheduler_are_refused(scheduler, changes, said):
    with pytest.raises(UserError, match=said):
        Noising(scheduler, **changes)
