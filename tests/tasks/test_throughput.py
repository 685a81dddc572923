import time

import pytest
import torch
from lightning.pytorch import Callback

from tests.tasks.tiny import make_data, make_run, make_task, make_trainer, quiet
from zoo import tracking
from zoo.data.stages import Stage
from zoo.tasks.throughput import Throughput, peak_gib


class Slow(Callback):
    """Ten images in 50 ms; validations and one checkpoint that take much longer."""

    def on_train_batch_start(self, *_):
        time.sleep(0.05)

    def on_validation_start(self, trainer, pl_module):
        time.sleep(0.3)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            time.sleep(0.3)


def test_speed_counts_training_alone_and_memory_its_peak(tmp_path):
    quiet()
    run = make_run(tmp_path / "runs")
    data = make_data(tmp_path / "pictures", stages=[Stage(None, 10, 8)])
    make_trainer(run, [Throughput(), Slow()], max_steps=8, val_check_interval=2).fit(make_task(), datamodule=data)
    rows, _ = tracking.read_table(run.folder / "metrics.csv")
    assert "perf/images_per_s" not in rows[0], "one batch has no beginning to measure from"
    assert 60 < float(rows[-1]["perf/images_per_s"]) <= 200
    assert 0.1 < float(rows[-1]["perf/peak_gib"]) < 100


def test_peak_memory_grows_with_what_is_used():
    before = peak_gib(torch.device("cpu"))
    held = torch.ones(2**27 // 4 * 3)  # 3/8 GiB
    assert peak_gib(torch.device("cpu")) >= before
    assert peak_gib(torch.device("cpu")) > held.nbytes / 2**30


@pytest.mark.gpu
def test_peak_memory_of_a_gpu():
    held = torch.ones(2**28, device="cuda")
    assert peak_gib(held.device) >= 1.0
