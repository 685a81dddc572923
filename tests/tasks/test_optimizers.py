import math

import pytest
import torch
from torch import nn, optim

from zoo.errors import UserError
from zoo.tasks.optimizers import WarmupCosine, build_optimizer, build_schedule


def parameters():
    return [nn.Parameter(torch.ones(2))]


def adam(lr=1.0):
    return build_optimizer({"class_path": "Adam", "init_args": {"lr": lr}}, parameters())


def rates(schedule, steps):
    values = []
    for _ in range(steps):
        values.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return values


@pytest.mark.parametrize("name", ["AdamW", "torch.optim.AdamW"])
def test_an_optimizer_is_built_from_plain_data(name):
    spec = {"class_path": name, "init_args": {"lr": 3e-4, "betas": [0.9, 0.99], "weight_decay": 0.02}}
    built = build_optimizer(spec, iter(parameters()))
    assert type(built) is optim.AdamW
    assert built.defaults["lr"] == 3e-4
    assert list(built.defaults["betas"]) == [0.9, 0.99]


def test_a_class_from_elsewhere_is_that_class_and_not_torchs_of_the_same_name(tmp_path, monkeypatch):
    (tmp_path / "own_optimizer.py").write_text(
        "from torch import optim\n"
        "class Adam(optim.SGD):\n    def __init__(self, params, **rest):\n        super().__init__(params, **rest)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built = build_optimizer({"class_path": "own_optimizer.Adam", "init_args": {"lr": 0.5}}, parameters())
    assert isinstance(built, optim.SGD)
    assert built.defaults["lr"] == 0.5
    for name in ("own_optimizer.Adan", "own_optimiser.Adam", "own_optimizer.optim"):
        with pytest.raises(UserError, match=f"optimizer '{name}' is unknown"):
            build_optimizer({"class_path": name}, parameters())


def test_a_schedule_is_stepped_as_torch_does():
    spec = {"class_path": "MultiStepLR", "init_args": {"milestones": [2, 4], "gamma": 0.5}}
    assert rates(build_schedule(spec, adam()), 6) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warmup_cosine_rises_falls_and_stays_on_its_floor():
    spec = {"class_path": "WarmupCosine", "init_args": {"warmup": 4, "total": 12, "floor": 0.1}}
    values = rates(build_schedule(spec, adam(2.0)), 16)
    assert values[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert values[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))))
    assert values[12:] == pytest.approx([0.2] * 4)


def test_the_full_rate_can_be_held_before_the_cosine():
    spec = {"class_path": "WarmupCosine", "init_args": {"warmup": 0, "hold": 5, "total": 9, "floor": 0.5}}
    values = rates(build_schedule(spec, adam(2.0)), 11)
    assert values[:6] == [2.0] * 6
    assert values[7] == pytest.approx(1.5), "half way down"
    assert values[9:] == [1.0] * 2


def test_a_schedule_goes_through_a_checkpoint(tmp_path):
    for spec in (
        {"class_path": "WarmupCosine", "init_args": {"warmup": 2, "total": 9}},
        {"class_path": "MultiStepLR", "init_args": {"milestones": [2, 4]}},
        {"class_path": "CosineAnnealingWarmRestarts", "init_args": {"T_0": 3}},
    ):
        whole = rates(build_schedule(spec, adam()), 8)
        first = build_schedule(spec, adam())
        rates(first, 3)
        torch.save([first.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")
        second = build_schedule(spec, adam())
        schedule_state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
        second.optimizer.load_state_dict(optimizer_state)
        second.load_state_dict(schedule_state)
        assert rates(second, 5) == whole[3:]


WRONG = {
    "'Adan' is unknown or needs more than plain data. Did you mean 'Adam'": {"class_path": "Adan"},
    "Adam has no argument 'learning_rate'": {"class_path": "Adam", "init_args": {"learning_rate": 1}},
    "Adam: Invalid learning rate": {"class_path": "Adam", "init_args": {"lr": -1.0}},
    "Adam: ": {"class_path": "Adam", "init_args": {"lr": "fast"}},
    "'LBFGS' is unknown or needs more": {"class_path": "LBFGS"},
    "'torch.optim.LBFGS' is unknown or needs more": {"class_path": "torch.optim.LBFGS"},
    "must be a mapping of class_path and init_args": {"name": "Adam"},
    "'os.system' is unknown": {"class_path": "os.system"},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_optimizer_is_one_sentence(message):
    with pytest.raises(UserError, match=f"^optimizer.*{message}"):
        build_optimizer(WRONG[message], parameters())


def test_a_wrong_schedule_is_one_sentence():
    with pytest.raises(UserError, match=r"MultiStepLR has no argument 'milestone'\. Did you mean 'milestones'"):
        build_schedule({"class_path": "MultiStepLR", "init_args": {"milestone": [1]}}, adam())
    with pytest.raises(UserError, match="'ReduceLROnPlateau' is unknown or needs more than plain data"):
        build_schedule({"class_path": "ReduceLROnPlateau"}, adam())
    with pytest.raises(UserError, match=r"warmup \+ hold < total"):
        WarmupCosine(adam(), warmup=9, total=9)
    with pytest.raises(UserError, match=r"^schedule WarmupCosine: needs 0"):
        build_schedule({"class_path": "WarmupCosine", "init_args": {"warmup": 9, "total": 9}}, adam())
