import copy
import signal

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn import functional as F

from tests.tasks.test_resume import At, differences
from tests.tasks.tiny import ADAM, PLAIN, in_child, make_data, make_run, make_trainer, quiet
from zoo import models, tracking
from zoo.errors import UserError
from zoo.tasks.adversarial import AdversarialTask
from zoo.tasks.ema import EMA
from zoo.tasks.objectives import L1

RIVAL = {"class_path": "Adam", "init_args": {"lr": 5e-4}}
HALVING = {"class_path": "MultiStepLR", "init_args": {"milestones": [3], "gamma": 0.5}}
STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    quiet()
    return tmp_path_factory.mktemp("adversarial")


def make_task(**changes):
    torch.manual_seed(0)
    settings = {"network": PLAIN, "objectives": [L1()], "optimizer": ADAM, "schedule": HALVING}
    settings |= {"discriminator": {"num_feat": 4}, "discriminator_optimizer": RIVAL}
    return AdversarialTask(**(settings | changes))


class Batches(Callback):
    """Keeps what the task was given."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.seen.append({key: batch[key].clone() for key in ("lq", "gt")})


def fit(place, run, *callbacks, **changes):
    task = make_task()
    trainer = make_trainer(run, [EMA([0.5]), *callbacks], **({"max_steps": STEPS} | changes))
    trainer.fit(task, datamodule=make_data(place / "pictures"), ckpt_path=run.checkpoint)
    return task, trainer


@pytest.fixture(scope="module")
def trained(place):
    run, batches = make_run(place / "whole"), Batches()
    return run, *fit(place, run, batches), batches.seen


def by_hand(batches):
    """The same training in plain PyTorch, with the field's own words for the losses."""
    task = copy.deepcopy(make_task())
    network, judge = task.network, task.discriminator
    own = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99))
    rival = torch.optim.Adam(judge.parameters(), 5e-4)
    halvings = [torch.optim.lr_scheduler.MultiStepLR(optimizer, [3], 0.5) for optimizer in (own, rival)]
    vanilla = lambda logits, real: F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))
    for batch in batches:
        restored = network(batch["lq"])
        loss = (restored - batch["gt"]).abs().mean() + 0.1 * vanilla(judge(restored), True)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rival.zero_grad()
        for weight, gradient in zip(network.parameters(), gradients, strict=True):
            weight.grad = gradient
        own.step()
        (vanilla(judge(batch["gt"]), True)).backward()
        (vanilla(judge(restored.detach()), False)).backward()
        rival.step()
        for halving in halvings:
            halving.step()
    return network, judge


def test_training_is_what_plain_pytorch_makes_of_the_two_losses(trained):
    _, task, trainer, batches = trained
    assert trainer.global_step == STEPS, "the discriminator's steps do not count"
    network, judge = by_hand(batches)
    for ours, right in ((task.network, network), (task.discriminator, judge)):
        right = right.state_dict()
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, right[name], rtol=0, atol=2e-6, msg=name)


def test_both_networks_are_logged_and_only_the_restorer_is_averaged_and_written(trained):
    run, task, trainer, _ = trained
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    last = {name: float(value) for name, value in rows[-1].items() if value}
    parts = {"train/l1", "train/adversarial", "train/discriminator", "train/real", "train/fake", "train/lr"}
    assert parts - {"train/l1"} <= set(last)
    assert last["train/lr"] == pytest.approx(5e-4)
    assert last["train/discriminator"] == pytest.approx(2 * 0.6931, abs=0.1), "an untrained judge knows nothing"
    (average,) = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]
    assert set(average.average()) == {f"network.{name}" for name, _ in task.network.named_parameters()}
    for source in (run.folder, run.checkpoint):
        assert type(models.load(str(source))) is type(task.network)


def test_a_killed_training_goes_on_to_the_same_bits(place, trained, tmp_path):
    run, *_ = trained
    other = make_run(tmp_path)
    said = place / "said.txt"
    assert in_child(lambda: fit(place, other, At("batch", 5, signal.SIGKILL)), said) == -signal.SIGKILL
    assert in_child(lambda: fit(place, other), said) == 0, said.read_text()
    kept = ("state_dict", "optimizer_states", "lr_schedulers")
    ours, right = (torch.load(r.checkpoint, weights_only=True) for r in (other, run))
    assert len(right["optimizer_states"]) == len(right["lr_schedulers"]) == 2
    assert differences({k: ours[k] for k in kept}, {k: right[k] for k in kept}) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adversarial": 0}, "adversarial must be positive, got 0; without it take RestorationTask"),
        ({"discriminator": {"features": 4}}, "it takes num_in_ch, num_feat, skip_connection"),
        ({"discriminator_optimizer": {"class_path": "Adm"}}, "Adam"),
    ],
)
def test_mistakes_cost_one_sentence(changes, said):
    with pytest.raises(UserError, match=said):
        make_task(**changes)


def test_a_precision_that_does_not_suit_two_optimisers_is_refused(place):
    trainer = make_trainer(make_run(place / "half"), precision="bf16-true")
    with pytest.raises(UserError, match=r"set trainer\.precision to one of 32-true"):
        trainer.fit(make_task(), datamodule=make_data(place / "pictures"))
