import inspect

import numpy as np
import pytest
import torch

from zoo.cli.recipes import SHEETS
from zoo.data.crops import ValidationSet
from zoo.data.degradations import Jpeg
from zoo.data.restoration import RestorationData
from zoo.data.sheets import STEPS, TRAIN, default_data, sheet
from zoo.data.weather import Rain, Snow
from zoo.errors import UserError
from zoo.recipe.schema import FIELDS


def test_every_degradation_has_a_sheet_and_the_command_knows_its_name():
    named = {name.lower() for name in FIELDS["data", "init_args", "degradation"].ours}
    assert set(STEPS) == named
    assert set(SHEETS) == {"shapes", *STEPS, TRAIN}


@pytest.mark.parametrize("name", STEPS)
def test_a_sheet_shows_samples_beside_their_targets_and_is_the_same_for_the_same_seed(name):
    picture, captions = sheet(default_data(name, 3), name, num=2, size=64)
    assert picture.dtype == np.uint8
    assert picture.shape[1] > 4 * 192, "two pairs of enlarged squares"
    assert len(captions) == 2
    assert all(captions)
    again, same = sheet(default_data(name, 3), name, num=2, size=64)
    assert np.array_equal(picture, again)
    assert captions == same
    assert not np.array_equal(picture, sheet(default_data(name, 4), name, num=2, size=64)[0])


def test_what_is_shown_is_what_training_sees():
    data = RestorationData("demo", upscale=2, degradation=[Jpeg((20, 60))], seed=5)
    _, captions = sheet(data, TRAIN, num=3, size=64)
    data.setup("fit")
    draws = data.train_dataloader()._sampler(0).batch(0)[:3]
    stage_free = [draw._replace(crop=32) for draw in draws]
    assert captions == [", ".join(data.train.told(draw)[1]) for draw in stage_free]
    assert all(caption.startswith("bicubic 1/2, jpeg ") for caption in captions)


def test_one_step_of_a_recipe_is_shown_by_its_settings():
    sets = {"snowy": ValidationSet("demo", [Snow(25.0)])}
    data = RestorationData("demo", upscale=1, degradation=[Rain(21.0), Jpeg(50)], validation=sets)
    assert sheet(data, "rain", num=1, size=64)[1][0].startswith("rain 21.0 dB")
    assert sheet(data, "snow", num=1, size=64)[1][0].startswith("snow 25.0 dB")
    both = sheet(data, TRAIN, num=1, size=64)[1][0]
    assert both.startswith("rain 21.0 dB")
    assert both.endswith("jpeg 50")
    with pytest.raises(UserError, match="no step 'realworld'; name train, or one of theirs: rain, jpeg, snow"):
        sheet(data, "realworld")
    with pytest.raises(UserError, match="--data train shows the data of a recipe"):
        default_data(TRAIN)


def test_every_parameter_of_a_step_can_be_set_by_a_recipe():
    for step in STEPS.values():
        for parameter in inspect.signature(step).parameters.values():
            assert parameter.default is not parameter.empty
            assert not isinstance(parameter.default, torch.Tensor)
