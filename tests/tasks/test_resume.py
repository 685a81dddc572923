"""Exact resume: whatever ends a training, going on gives the bits of the unbroken one."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from tests.tasks.tiny import HALVING, HAT, in_child, make_data, make_run, make_task, make_trainer, quiet
from zoo import models, tracking
from zoo.data.sampler import ResumableLoader
from zoo.data.stages import Stage
from zoo.tasks.ema import EMA
from zoo.tasks.previews import Previews
from zoo.tasks.run import Run
from zoo.tasks.throughput import Throughput

PLACES = {"dirpath", "best_model_path", "last_model_path", "best_k_models", "kth_best_model_path"}  # of a checkpoint
STATUS = {"hash": "tiny", "protocol": "PSNR-Y, crop 2, uint8"}


class At(Callback):
    """Sends a signal to its own process at a given point; SIGKILL leaves no time for anything."""

    def __init__(self, hook, step, number):
        self.hook, self.step, self.number = hook, step, number

    def _hit(self, hook, trainer):
        if hook == self.hook and trainer.global_step == self.step and not trainer.sanity_checking:
            self.hook = None
            os.kill(os.getpid(), self.number)
            time.sleep(0.01 if self.number != signal.SIGKILL else 10)

    def on_train_batch_start(self, trainer, *_):
        self._hit("batch", trainer)

    def on_train_batch_end(self, trainer, *_):
        self._hit("batch end", trainer)

    def on_validation_batch_end(self, trainer, *_):
        self._hit("validation", trainer)


class WithoutPosition(ResumableLoader):
    """The mistake that the comparison must notice."""

    def state_dict(self):
        state = super().state_dict()
        return {**state, "step": state["step"] + 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    quiet()
    return tmp_path_factory.mktemp("resume")


def train(place, folder, *extra, wrong_loader=False, workers=0):
    """Train in a child from the checkpoint that is there, if any; the exit code."""

    def work():
        run = Run.open(folder)
        data = make_data(place / "pictures", workers=workers)
        if wrong_loader:
            plain = data.train_dataloader

            def shifted():
                loader = plain()
                loader.__class__ = WithoutPosition
                return loader

            data.train_dataloader = shifted
        trainer = make_trainer(run, [EMA([0.9, 0.5]), Throughput(), Previews(every=4, count=1), *extra])
        trainer.fit(make_task(network=HAT, schedule=HALVING), datamodule=data, ckpt_path=run.checkpoint)

    return in_child(work, place / "said.txt")


def results(folder):
    """Everything that training leaves, without paths and timings."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for state in checkpoint["callbacks"].values():
        for name in PLACES & set(state):
            del state[name]
    rows, _ = tracking.read_table(folder / "metrics.csv")
    rows = [{name: value for name, value in row.items() if not name.startswith("perf/")} for row in rows]
    media = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.glob("media/*/*.png"))}
    weights = load_file(folder / "weights.safetensors")
    return {"weights": weights, "checkpoint": checkpoint, "rows": rows, "media": media}


def differences(actual, expected, path=""):
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(actual, expected) else [path]
    if isinstance(expected, (list, tuple)):
        actual, expected = dict(enumerate(actual)), dict(enumerate(expected))
    if isinstance(expected, dict):
        odd = [f"{path}/{key} is in one only" for key in set(actual) ^ set(expected)]
        return odd + [
            d for k in set(expected) & set(actual) for d in differences(actual[k], expected[k], f"{path}/{k}")
        ]
    return [] if actual == expected else [f"{path}: {str(actual)[:40]}, not {str(expected)[:40]}"]


@pytest.fixture(scope="module")
def unbroken(place):
    folder = make_run(place / "unbroken").folder
    assert train(place, folder) == 0, (place / "said.txt").read_text()
    return results(folder)


KILLS = {
    "first epoch": [("batch", 3)],
    "second epoch, then in the validation": [("batch", 7), ("validation", 8)],
    "last batch of an epoch": [("batch end", 5), ("batch", 6)],
    "before the first checkpoint": [("batch", 1)],
}


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_training_goes_on_to_the_same_bits(name, place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    for hook, step in KILLS[name]:
        assert train(place, folder, At(hook, step, signal.SIGKILL)) == -signal.SIGKILL
        assert Run(folder).status["state"] == "running"
    assert train(place, folder) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []
    assert Run(folder).status == STATUS | {"state": "finished", "step": 9}


def test_worker_processes_change_nothing(place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    assert train(place, folder, At("batch", 6, signal.SIGKILL), workers=1) == -signal.SIGKILL
    assert train(place, folder, workers=1) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []


def test_the_comparison_notices_a_loader_that_is_off_by_one(place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    assert train(place, folder, At("batch", 3, signal.SIGKILL), wrong_loader=True) == -signal.SIGKILL
    assert train(place, folder) == 0
    found = differences(results(folder), unbroken)
    assert any(line.startswith("/weights/") for line in found)


@pytest.mark.parametrize(
    ("number", "hook", "code"),
    [(signal.SIGTERM, "batch", 143), (signal.SIGTERM, "validation", 143), (signal.SIGINT, "batch end", 130)],
)
def test_a_stopped_training_saves_its_step_and_goes_on_to_the_same_bits(number, hook, code, place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    assert train(place, folder, At(hook, 4, number)) == code, (place / "said.txt").read_text()
    # In the batch: that step is finished. At its end: this step. In the validation after it: one step more.
    reached = 4 if hook == "batch end" else 5
    assert Run(folder).status == STATUS | {"state": "interrupted", "step": reached}
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == reached
    averages = stored["callbacks"]["EMA"]["averages"][0]["weights"]
    written = load_file(folder / "weights.safetensors")
    assert all(torch.equal(written[name.removeprefix("network.")], value) for name, value in averages.items())
    assert train(place, folder) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []


def test_a_stop_for_the_whole_process_group_saves_too(place, unbroken, tmp_path):
    """As service managers, `timeout` and terminals send it: the data workers get the signal as well."""
    folder = make_run(tmp_path).folder

    class Outside(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                group = os.getpgrp()
                sender = os.fork()  # torch's workers tell a signal of their parent from one of a stranger
                if sender == 0:
                    os.setpgrp()
                    os.killpg(group, signal.SIGTERM)
                    os._exit(0)
                os.waitpid(sender, 0)
                time.sleep(0.2)

    class Apart(Callback):
        def setup(self, trainer, *_, **__):
            os.setpgrp()

    assert train(place, folder, Apart(), Outside(), workers=1) == 143, (place / "said.txt").read_text()
    assert Run(folder).status["step"] == 4
    assert train(place, folder, workers=1) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []


def test_sigusr1_saves_and_goes_on(place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder

    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:  # between two regular checkpoints
                stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
                assert stored["global_step"] == 3
                assert models.load(str(folder / "weights.safetensors")).upscale == 2

    assert train(place, folder, At("batch", 2, signal.SIGUSR1), Look()) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []


def test_a_second_interrupt_stops_at_once(place, tmp_path):
    folder = make_run(tmp_path).folder

    class Impatient(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
                raise AssertionError("the second interrupt did nothing")

    assert train(place, folder, Impatient()) == 1  # Lightning's exit code for KeyboardInterrupt
    assert Run(folder).status["state"] == "interrupted"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_signals_are_given_back_and_accumulated_gradients_waited_for(place, tmp_path):
    run = make_run(tmp_path)

    def work():
        def mine(number, frame):
            raise AssertionError("the trainer did not listen")

        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, mine)
        data = make_data(place / "pictures", epoch_steps=4, stages=[Stage(None, 2, 8)])
        trainer = make_trainer(run, [At("batch", 1, signal.SIGUSR1)], accumulate_grad_batches=2, max_steps=3, every=50)
        trainer.fit(make_task(), datamodule=data)
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is mine
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL

    assert in_child(work, place / "said.txt") == 0, (place / "said.txt").read_text()
    assert run.status == STATUS | {"state": "finished", "step": 3}


def test_a_run_killed_between_its_last_checkpoint_and_its_end_is_finished_by_resuming(place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    assert train(place, folder) == 0
    (folder / "weights.safetensors").unlink()
    Run(folder).mark("running", 9)
    assert train(place, folder) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []
    assert Run(folder).status["state"] == "finished"


def test_a_killed_run_is_used_with_the_average_of_its_newest_checkpoint(place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    assert train(place, folder, At("batch", 2, signal.SIGTERM)) == 143
    assert train(place, folder, At("batch", 7, signal.SIGKILL)) == -signal.SIGKILL
    stored = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 6
    used = models.load(str(folder)).state_dict()
    averages = stored["callbacks"]["EMA"]["averages"][0]["weights"]
    assert all(torch.equal(used[name.removeprefix("network.")], value) for name, value in averages.items())
    assert train(place, folder) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []


def test_a_kill_between_weights_and_checkpoint_leaves_the_weights(place, unbroken, tmp_path):
    folder = make_run(tmp_path).folder
    replace = Path.replace

    def killed(self, target):
        if Path(target).name == "last.ckpt":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        assert train(place, folder) == -signal.SIGKILL
    assert Run(folder).checkpoint is None
    assert models.load(str(folder)).upscale == 2
    assert train(place, folder) == 0, (place / "said.txt").read_text()
    assert differences(results(folder), unbroken) == []


def test_checkpoints_open_without_lightning_and_without_code(place, unbroken):
    folder = place / "unbroken" / "0001"
    averaged, live = models.load(str(folder)), models.load(str(folder / "checkpoints" / "last.ckpt"))
    assert type(averaged) is type(live)
    assert averaged.config == live.config
    kept = unbroken["checkpoint"]["zoo"]
    assert kept["arch"] == "hat"
    assert kept["config"]["window_size"] == 4
