"""Generators judged on unseen prompts, between their bounds."""

import math

import numpy as np
import pytest
import torch

from tests.pipelines.tiny import stable_diffusion
from zoo.data.shapes import draw, render
from zoo.errors import UserError
from zoo.evaluate.generators import PromptTrial, unseen
from zoo.metrics.fid import scores
from zoo.models import create
from zoo.models.weights import write_weights
from zoo.pipelines.sampling import Settings
from zoo.scene import parse


@pytest.fixture(scope="module")
def trial():
    return PromptTrial(stable_diffusion(), 9, Settings(steps=1, size=(64, 64)), features=None)


@pytest.fixture(scope="module")
def rows(trial):
    return {row.name: row for row in trial.run()}


def test_prompts_are_unseen_different_and_balanced():
    samples = unseen(0, 60)
    captions = [sample.caption for sample in samples]
    assert len(set(captions)) == 60
    assert all(parse(caption).held_out for caption in captions)
    assert np.bincount([len(s.scene.things) for s in samples]).tolist() == [0, 20, 20, 20]
    assert captions == [s.caption for s in unseen(0, 60)] != [s.caption for s in unseen(1, 60)]
    assert not {draw(0, n).caption for n in range(500)} & set(captions)


def test_the_bounds_are_what_they_should_be(rows):
    assert rows["real pictures"].share() == 1
    assert rows["noise"].share() == 0
    assert rows["other prompts"].share() == 0
    assert rows["StableDiffusionPipeline"].share() == 0, "random weights obey nobody"
    assert set(rows) == {
        "real pictures",
        "through the autoencoder",
        "StableDiffusionPipeline",
        "other prompts",
        "noise",
    }


def test_shares_are_split_by_the_number_of_things(rows):
    row = rows["real pictures"]
    assert [row.share("shape", things=n) for n in (1, 2, 3)] == [1, 1, 1]
    assert math.isnan(row.share(things=4))


def test_a_perfect_generator_scores_as_real_pictures(trial, monkeypatch):
    """Sampling is replaced by painting, so that everything behind it is tested on a known answer."""
    by_caption = {sample.caption: sample for sample in trial.samples}

    def paint(prompt, seed, tell):
        sample = by_caption[prompt]
        return render(sample.scene, sample.places).astype(np.float32) / 255

    monkeypatch.setattr(trial.sampler, "_one", paint)
    found = {row.name: row for row in trial.run()}
    assert found["StableDiffusionPipeline"].share() == 1
    assert found["other prompts"].share() == 0
    assert found["other prompts"].share("count") == 1, "not for the number of things"
    trial.figure(trial.run()[2])


def test_distances_are_measured_to_pictures_of_as_many_things(tmp_path):
    torch.manual_seed(0)
    network = create({"family": "plain-features", "widths": [8], "depths": [1], "num_features": 4})
    weights = write_weights(tmp_path / "features.safetensors", network)
    trial = PromptTrial(stable_diffusion(), 8, Settings(steps=1, size=(64, 64)), things=1, features=str(weights))
    rows = {row.name: row for row in trial.run()}
    fids = {name: row.distances[0].value for name, row in rows.items() if row.distances}
    assert set(fids) == {"real pictures", "through the autoencoder", "StableDiffusionPipeline", "noise"}
    real, world = ([render(s.scene, s.places) for s in unseen(seed, 8, 1)] for seed in (0, 1))
    assert fids["real pictures"] == pytest.approx(scores(real, world, str(weights))[0].value, rel=1e-6)


def test_every_number_says_how_it_was_made(trial):
    assert trial.protocol == "9 unseen prompts, seed 0, 1 steps, guidance 7.5, DDIMScheduler"


def test_impossible_trials_are_refused():
    with pytest.raises(UserError, match="at least 2 prompts"):
        PromptTrial(stable_diffusion(), 1)
    with pytest.raises(UserError, match="things must be 1 to 3"):
        PromptTrial(stable_diffusion(), 4, things=5)
