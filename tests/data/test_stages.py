import pytest

from zoo.data.stages import Plan, Stage
from zoo.errors import UserError

STAGES = [Stage(3, 8, 16), Stage(5, 4, 24), Stage(None, 2, 32)]


def test_a_step_belongs_to_the_first_stage_that_has_not_ended():
    plan = Plan(STAGES)
    assert [plan.at(step).patch_size for step in range(7)] == [16, 16, 16, 24, 24, 32, 32]
    assert [plan.start(step) for step in range(7)] == [0, 0, 0, 3, 3, 5, 5]


def test_images_taken_are_the_sum_of_all_batches():
    plan = Plan(STAGES)
    batches = [plan.at(step).batch_size for step in range(9)]
    assert [plan.drawn(step) for step in range(10)] == [sum(batches[:step]) for step in range(10)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "the last stage must not end"),
        ([Stage(5)], "write until: null"),
        ([Stage(5), Stage(5), Stage()], "larger than the one before"),
        ([Stage(9), Stage(5), Stage()], "larger than the one before"),
        ([Stage(None), Stage()], "larger than the one before"),
    ],
)
def test_contradictory_stages_are_refused(stages, message):
    with pytest.raises(UserError, match=message):
        Plan(stages)


@pytest.mark.parametrize("name", ["until", "batch_size", "patch_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(UserError, match=f"{name} must be at least 1, got 0"):
        Stage(**{name: 0})


def test_batches_that_ranks_cannot_share_are_refused():
    Plan(STAGES).check_divisible(2)
    with pytest.raises(UserError, match=r"batch_size 2 cannot be shared by 2 ranks with 2 accumulated.*multiple of 4"):
        Plan(STAGES).check_divisible(2, accumulate=2)
