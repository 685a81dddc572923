"""Real W&B throughout: offline, without a key, without a network, broken, and not installed."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from zoo import tracking
from zoo.errors import UserError

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="W&B is not installed")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user without any W&B settings, in a home folder of their own."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    for name, value in {"HOME": folder, "NETRC": folder / ".netrc", "XDG_CACHE_HOME": folder / ".cache"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("WANDB_DIR", "")  # so that what `loggers` sets is taken back after the test
    monkeypatch.setenv("WANDB_DATA_DIR", "")
    yield folder
    if "wandb" in sys.modules and getattr(sys.modules["wandb"], "run", None) is not None:
        sys.modules["wandb"].finish()


def table(folder):
    return (folder / "metrics.csv").read_text()


def test_rows_keep_full_precision_and_values_of_one_step_share_a_row(tmp_path):
    log = tracking.RunTable(tmp_path)
    log.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 0}, 0)
    log.log_metrics({"train/loss": 1e-9, "epoch": 0}, 1)
    log.log_metrics({"val/psnr_y": 27.5}, 1)
    log.log_metrics({"train/loss": float("inf"), "val/psnr_y": 28.0}, 2)
    assert table(tmp_path) == (
        "step,train/loss,val/psnr_y\n1,0.30000000000000004,\n2,1e-09,27.5\n3,inf,28.0\n"
    )  # steps are counted as finished ones, epochs left out


def test_every_row_is_on_disk_when_logging_returns(tmp_path):
    child = os.fork()
    if child == 0:
        log = tracking.RunTable(tmp_path)
        for step in range(5):
            log.log_metrics({"train/loss": step / 7}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert table(tmp_path).count("\n") == 6


def test_a_resumed_table_drops_what_lies_beyond_and_repeats_nothing(tmp_path):
    first = tracking.RunTable(tmp_path)
    for step in range(10):
        first.log_metrics({"train/loss": float(step)}, step)
    first.log_metrics({"val/psnr_y": 1.0}, 9)
    resumed = tracking.RunTable(tmp_path)  # from a checkpoint of step 6
    resumed.log_metrics({"train/loss": 6.5}, 6)
    rows, columns = tracking.read_table(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 8))
    assert rows[-1] == {"step": "7", "train/loss": "6.5"}
    assert columns == ["step", "train/loss", "val/psnr_y"]


def test_a_validation_repeated_after_a_resume_joins_the_row_of_its_step(tmp_path):
    tracking.RunTable(tmp_path).log_metrics({"train/loss": 1.0}, 3)
    tracking.RunTable(tmp_path).log_metrics({"val/psnr_y": 2.0}, 3)
    assert table(tmp_path) == "step,train/loss,val/psnr_y\n4,1.0,2.0\n"


def test_a_half_written_line_is_left_out(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.2")
    assert tracking.read_table(tmp_path / "metrics.csv") == (
        [{"step": "1", "train/loss": "0.5"}],
        ["step", "train/loss"],
    )
    tracking.RunTable(tmp_path).log_metrics({"train/loss": 0.25}, 1)
    assert table(tmp_path) == "step,train/loss\n1,0.5\n2,0.25\n"
    assert tracking.read_table(tmp_path / "nothing.csv") == ([], ["step"])


def test_pictures_are_files_first(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    (path,) = tracking.log_media([], tmp_path, "preview", pixels, 200)
    assert path == tmp_path / "media" / "step_000200" / "preview.png"
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    several = tracking.log_media([], tmp_path, "more", [pixels, pixels[..., 0]], 0)
    assert [p.name for p in several] == ["more-0.png", "more-1.png"]
    assert not list(tmp_path.rglob("*.part"))


def test_csv_alone_never_imports_wandb(tmp_path, home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    (only,) = tracking.loggers(tmp_path, "csv")
    assert isinstance(only, tracking.RunTable)
    assert tracking.run_folder([only]) == tmp_path
    assert tracking.run_folder([]) is None


def test_without_wandb_auto_goes_on_and_an_explicit_wish_is_one_sentence(tmp_path, home, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert len(tracking.loggers(tmp_path, "auto")) == 1
    with pytest.raises(UserError, match=r"tracking: W&B cannot be imported .*pip install wandb, or tracking=csv"):
        tracking.loggers(tmp_path, "wandb")


def test_a_broken_wandb_is_like_none(tmp_path, home, monkeypatch):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('protobuf is too old')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert len(tracking.loggers(tmp_path, "auto")) == 1


def test_disabled_and_misspelt(tmp_path, home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert len(tracking.loggers(tmp_path, "auto")) == 1
    with pytest.raises(UserError, match="must be auto, csv or wandb, got 'wandbb'"):
        tracking.loggers(tmp_path, "wandbb")


@needs_wandb
def test_online_without_a_key_neither_asks_nor_waits(tmp_path, home):
    import wandb

    assert wandb
    start = time.monotonic()
    assert len(tracking.loggers(tmp_path, "auto")) == 1
    with pytest.raises(UserError, match="W&B has no key; set WANDB_API_KEY or WANDB_MODE=offline"):
        tracking.loggers(tmp_path, "wandb")
    assert time.monotonic() - start < 5


class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(loggers, folder):
    options = {"logger": loggers, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=3, log_every_n_steps=1, default_root_dir=folder, enable_checkpointing=False, **options)
    trainer.fit(Tiny(), torch.ones(3, 1, 1))


@needs_wandb
def test_offline_keeps_metrics_pictures_and_weights_below_the_run(tmp_path, home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "0001"
    run.mkdir()
    found = tracking.loggers(run, "auto", name="tiny", config={"model": {"lr": 0.125}})
    assert [type(logger) for logger in found] == [tracking.RunTable, tracking.CalmWandbLogger]
    fit(found, run)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    (picture,) = tracking.log_media(found, run, "preview", pixels, 3)
    weights = run / "weights.safetensors"
    weights.write_bytes(b"weights of this run")
    tracking.log_artifact(found, weights, "weights-0001")
    found[1].experiment.finish()

    (stored,) = (run / "wandb").glob("offline-run-*")
    shown = [path for path in stored.rglob("*.png") if path.read_bytes() == picture.read_bytes()]
    assert shown, "the picture is among W&B's files"
    (events,) = stored.glob("run-*.wandb")
    words = (b"train/loss", b"media/preview", b"weights-0001", b"lr", b"trainer/global_step")
    for _ in range(200):  # W&B's own process writes them a moment after `finish`
        missing = [word for word in words if word not in events.read_bytes()]
        if not missing:
            break
        time.sleep(0.1)
    assert not missing
    staged = [p for p in (run / "wandb" / "data").rglob("*") if p.is_file() and p.read_bytes() == weights.read_bytes()]
    assert staged, "the artifact waits below the run"
    assert table(run).count("\n") == 4
    # Its own log may lie in the home folder; nothing of the run does.
    assert not [p for p in home.rglob("*") if p.is_file() and p.suffix != ".log"]
    # A resumed run goes on under the same identity.
    identity = (run / "wandb" / "run-id.txt").read_text()
    again = tracking.loggers(run, "wandb")
    assert again[1].experiment.id == identity


@needs_wandb
def test_a_key_without_a_network_goes_on_offline_after_seconds(tmp_path, home, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(tracking, "CONNECT_SECONDS", 2.0)
    start = time.monotonic()
    with caplog.at_level("WARNING", "zoo.tracking"):
        found = tracking.loggers(tmp_path, "auto")
    assert time.monotonic() - start < 30
    assert len(found) == 2
    assert found[1].experiment.settings._offline
    assert caplog.text.count("goes on offline") == 1
    fit(found, tmp_path)
    assert table(tmp_path).count("\n") == 4


@needs_wandb
def test_a_logger_that_fails_later_is_left_out_and_said_once(tmp_path, home, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    found = tracking.loggers(tmp_path, "auto")

    def fails(*_, **__):
        raise BrokenPipeError("its service is gone")

    monkeypatch.setattr(found[1].experiment, "log", fails)
    with caplog.at_level("WARNING", "zoo.tracking"):
        fit(found, tmp_path)
        tracking.log_media(found, tmp_path, "preview", np.zeros((2, 2, 3), np.uint8), 1)
    assert caplog.text.count("its service is gone") == 1
    assert table(tmp_path).count("\n") == 4


def test_ranks_above_0_write_nothing(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (only,) = tracking.loggers(tmp_path, "auto")
    only.log_metrics({"train/loss": 1.0}, 0)
    assert not list(Path(tmp_path).iterdir())
