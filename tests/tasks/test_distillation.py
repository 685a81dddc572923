"""Students: beside their teacher on the same noise and captions, stored alone, and applied from the run's folder."""

import pytest
import torch

from tests.pipelines.tiny import stable_diffusion
from tests.tasks.tiny import make_run, make_trainer, quiet
from tests.tasks.tiny_generation import ADAMW, make_shapes
from zoo import apply, tracking
from zoo.errors import UserError
from zoo.tasks.distillation import DistillationTask
from zoo.tasks.ema import EMA

LINFUSION = {"name": "linfusion", "mid_dim_scale": 4}


def make(plugin=LINFUSION, **changes):
    return DistillationTask(pipeline=stable_diffusion(), plugin=plugin, optimizer=ADAMW, steps=2, **changes)


@pytest.fixture(scope="module")
def batch():
    return next(iter(make_shapes().train_dataloader()))


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(batch, teacher_forcing):
    same = make({"name": "clear-8", "window_size": 99}, teacher_forcing=teacher_forcing)
    same._loss(batch, 0.0)
    assert same._parts["prediction"].max() < 1e-10
    assert same._parts["align"].max() < 1e-10
    assert same._parts["target"].min() > 0.1
    other = make({"name": "clear-8", "window_size": 1}, teacher_forcing=teacher_forcing)
    other._loss(batch, 0.0)
    assert other._parts["align"].min() > 1e-8


def test_the_loss_is_the_weighted_sum_and_what_counts_nothing_is_not_computed(batch):
    task = make(losses={"target": 1.0, "prediction": 0.25, "align": 2.0})
    loss = task._loss(batch, 0.0)
    parts = task._parts
    torch.testing.assert_close(loss, parts["target"] + 0.25 * parts["prediction"] + 2 * parts["align"])
    alone = make(losses={"target": 1.0})
    calls = []
    alone.teacher.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(alone._loss(batch, 0.0), parts["target"])
    assert not calls


def test_align_is_the_mean_over_layers_of_their_outputs(batch):
    task = make(losses={"align": 1.0})
    outputs = {"student": {}, "teacher": {}}
    for who, network in (("student", task.denoiser), ("teacher", task.teacher)):
        for name in task.handle.plugin.layers:
            keep = lambda _, given, out, who=who, name=name: outputs[who].update({name: out.detach()})
            network.get_submodule(name).register_forward_hook(keep)
    loss = task._loss(batch, 0.0)
    errors = [
        (outputs["student"][name] - outputs["teacher"][name]).square().mean((1, 2))
        for name in task.handle.plugin.layers
    ]
    torch.testing.assert_close(loss, torch.stack(errors).mean(0))


def test_both_see_the_same_noise_and_the_same_captions_dropped_or_not(batch):
    task, seen = make(drop_caption=0.5), []
    for network in (task.teacher, task.denoiser):
        network.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    task._loss(batch, 0.5)
    (first, given), (second, other) = seen
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(given["encoder_hidden_states"], other["encoder_hidden_states"])


def test_a_run_keeps_the_student_alone_and_is_applied_as_it_lies(tmp_path):
    quiet()
    run = make_run(tmp_path)
    task = make()
    teacher = {key: value.clone() for key, value in task.teacher.state_dict().items()}
    trainer = make_trainer(run, [EMA([0.5])], max_steps=3)
    trainer.fit(task, datamodule=make_shapes())
    assert all(torch.equal(value, task.teacher.state_dict()[key]) for key, value in teacher.items())
    assert all(key.startswith("trained.plugin.") for key in task.state_dict())
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    assert {"train/loss", "train/target", "train/prediction", "train/align"} <= set().union(*rows)
    handle = apply(stable_diffusion(), run.folder)
    average = next(c for c in trainer.callbacks if isinstance(c, EMA)).average()
    for key, value in handle.plugin.parameters().items():
        assert torch.equal(value, average[f"trained.plugin.{key.replace('.', '/')}"])
    assert handle.plugin.config.mid_dim_scale == 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"losses": {"allign": 1.0}}, "loss 'allign' is unknown. Did you mean 'align'"),
        ({"losses": {"align": -1.0}}, "the weight of align must be at least 0"),
        ({"losses": {"align": 0.0}}, "must have a weight above 0"),
        ({"plugin": {"name": "clear-8", "windowsize": 4}}, "has no setting 'windowsize'. Did you mean 'window_size'"),
        ({"plugin": "linfuse"}, "plug-in 'linfuse' is unknown. Did you mean 'linfusion'"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        make(**wrong)
