import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from tests.tasks.tiny import HAT, make_data, make_run, make_task, make_trainer, quiet
from zoo.data.stages import Stage
from zoo.errors import UserError
from zoo.tasks.ema import EMA, averaged


class Small(LightningModule):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.network = nn.Linear(3, 2, dtype=dtype)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("table", torch.arange(961))
        self.register_buffer("mean", torch.zeros(2))


def moved(module, steps, amount=0.01):
    for _ in range(steps):
        with torch.no_grad():
            module.network.weight.add_(amount)
        yield


@pytest.mark.parametrize("ramp_up", [False, True])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_averages_follow_their_formula(ramp_up, on_cpu):
    module, ema = Small(), EMA([0.9, 0.5], ramp_up=ramp_up, on_cpu=on_cpu)
    ema.start(module)
    expected = {d: module.network.weight.detach().double().clone() for d in ema.decays}
    for n, _ in enumerate(moved(module, 20)):
        ema.update(module)
        for decay in ema.decays:
            used = min(decay, (1 + n) / (10 + n)) if ramp_up else decay
            expected[decay] = used * expected[decay] + (1 - used) * module.network.weight.detach().double()
    for decay in ema.decays:
        torch.testing.assert_close(ema.average(decay)["network.weight"].double(), expected[decay], rtol=0, atol=1e-6)
    assert set(ema.average()) == {"network.weight", "network.bias"}, "what is not trained is not averaged"


def test_bf16_weights_are_averaged_in_float32():
    module, ema = Small(torch.bfloat16), EMA([0.999])
    ema.start(module)
    before = ema.average()["network.weight"].clone()
    with torch.no_grad():
        module.network.weight.add_(0.25)
    for _ in range(100):
        ema.update(module)
    assert ema.average()["network.weight"].dtype == torch.float32
    gone = (ema.average()["network.weight"] - before) / (module.network.weight.detach().float() - before)
    torch.testing.assert_close(gone, torch.full_like(gone, 1 - 0.999**100), rtol=1e-3, atol=0)


def test_index_tables_stay_whole_where_the_stock_callback_damages_them():
    task = make_task(network=HAT)
    tables = {name: b.clone() for name, b in task.network.named_buffers() if not b.is_floating_point()}
    assert any("relative_position_index" in name for name in tables)
    stock, ours = EMAWeightAveraging(decay=0.9), EMA([0.9])
    stock.setup(None, task, "fit")
    ours.start(task)
    for step in range(1, 200):
        stock.on_train_batch_end(SimpleNamespace(global_step=step), task, None, None, 0)
        ours.update(task)
    # The stock average truncates 0.9 t + 0.1 t to integers: neighbours' indices get lost one by one.
    damaged = dict(stock._average_model.module.network.named_buffers())
    assert any(not torch.equal(damaged[name], table) for name, table in tables.items())
    with ours.swapped(task):
        kept = dict(task.network.named_buffers())
        assert all(torch.equal(kept[name], table) for name, table in tables.items())
    assert not set(ours.average()) & {f"network.{name}" for name in tables}


def test_swapping_gives_the_weights_back_whatever_happens():
    module, ema = Small(), EMA([0.9, 0.5])
    ema.start(module)
    for _ in moved(module, 5):
        ema.update(module)
    live = copy.deepcopy(module.state_dict())

    def break_off(decay):
        average = ema.average(decay)["network.weight"]
        with ema.swapped(module, decay):
            assert torch.equal(module.network.weight, average)
            with ema.swapped(module):  # an inner one changes nothing
                assert torch.equal(module.network.weight, average)
            assert torch.equal(module.network.weight, average)
            checkpoint = {"state_dict": dict(module.state_dict())}
            ema.on_save_checkpoint(None, module, checkpoint)
            assert torch.equal(checkpoint["state_dict"]["network.weight"], live["network.weight"])
            raise KeyError

    for decay in ema.decays:
        with pytest.raises(KeyError):
            break_off(decay)
        assert all(torch.equal(value, live[name]) for name, value in module.state_dict().items())


def test_a_state_goes_through_a_checkpoint_to_the_bit(tmp_path):
    module, ema = Small(), EMA([0.9, 0.5])
    ema.start(module)
    for _ in moved(module, 3):
        ema.update(module)
    torch.save(ema.state_dict(), tmp_path / "state.pt")
    again = EMA([0.9, 0.25])
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.start(module)
    assert torch.equal(again.average()["network.weight"], ema.average()["network.weight"])
    assert torch.equal(again.average(0.25)["network.weight"], module.network.weight), "a new decay begins here"
    assert again.updates == 3
    other = Small()
    other.network = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(UserError, match="averages are of another network"):
        again.start(other)


class Watch(Callback):
    """Notes the weights at the points where the average should and should not be in place."""

    def __init__(self):
        self.seen = {}

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.seen["validation"] = pl_module.network.conv_first.weight.detach().clone()

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen["training"] = pl_module.network.conv_first.weight.detach().clone()


def fit(tmp_path, ema, *callbacks, task=None):
    quiet()
    task = task or make_task()
    trainer = make_trainer(make_run(tmp_path / "runs"), [ema, *callbacks], max_steps=4)
    trainer.fit(task, datamodule=make_data(tmp_path / "pictures"))
    return task


def test_validation_sees_the_average_and_training_the_weights(tmp_path):
    ema, watch = EMA([0.5]), Watch()
    task = fit(tmp_path, ema, watch)
    assert ema.updates == 4
    assert torch.equal(watch.seen["validation"], ema.average()["network.conv_first.weight"])
    assert not torch.equal(watch.seen["validation"], task.network.conv_first.weight)
    assert not torch.equal(watch.seen["training"], watch.seen["validation"])
    with averaged(task):
        assert torch.equal(task.network.conv_first.weight, ema.average()["network.conv_first.weight"])


def test_a_validation_that_breaks_off_leaves_the_weights_themselves(tmp_path):
    ema, live = EMA([0.5]), {}

    class Breaks(Callback):
        def on_validation_start(self, trainer, pl_module):
            live.update(copy.deepcopy(pl_module.state_dict()))

        def on_validation_batch_end(self, trainer, pl_module, *_):
            if not trainer.sanity_checking:
                assert not torch.equal(pl_module.network.conv_first.weight, live["network.conv_first.weight"])
                raise RuntimeError("the disk is on fire")

    task = make_task()
    with pytest.raises(RuntimeError, match="on fire"):
        fit(tmp_path, ema, Breaks(), task=task)
    assert all(torch.equal(value, live[name]) for name, value in task.state_dict().items())


def test_accumulated_batches_count_once(tmp_path):
    quiet()
    ema = EMA([0.9])
    trainer = make_trainer(make_run(tmp_path / "runs"), [ema], max_steps=2, accumulate_grad_batches=3)
    trainer.fit(make_task(), datamodule=make_data(tmp_path / "pictures", stages=[Stage(None, 3, 8)]))
    assert ema.updates == 2


@pytest.mark.parametrize("decays", [[], [1.0], [0.9, -0.1]])
def test_wrong_decays_are_refused(decays):
    with pytest.raises(UserError, match="decays must be a list of numbers"):
        EMA(decays)
