"""A training that takes a second, and the means to run it in a process that may be killed."""

import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from PIL import Image

from zoo import tracking
from zoo.data.crops import ValidationSet
from zoo.data.restoration import RestorationData
from zoo.data.stages import Stage
from zoo.tasks.checkpoints import LastCheckpoint
from zoo.tasks.objectives import FFT, L1
from zoo.tasks.restoration import RestorationTask
from zoo.tasks.resume import Run, SaveOnSignal

PLAIN = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2}
# Index tables as buffers, and stochastic depth: what EMA and resume must get right.
HAT = {"family": "hat", "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "compress_ratio": 2}
HAT |= {"squeeze_factor": 2, "num_feat": 4, "drop_path_rate": 0.5, "upscale": 2, "img_size": 8}
ADAM = {"class_path": "Adam", "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]}}
HALVING = {"class_path": "MultiStepLR", "init_args": {"milestones": [4, 7], "gamma": 0.5}}


def pictures(folder, count=3, size=32):
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray((noise.random((5, 5, 3)) * 255).astype(np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"p{number}.png")
    return folder


def make_task(**changes):
    torch.manual_seed(0)
    settings = {
        "network": PLAIN,
        "objectives": [L1(), FFT(0.1)],
        "optimizer": ADAM,
        "crop_border": 2,
        "y_channel": True,
    }
    return RestorationTask(**(settings | changes))


def make_data(folder, **changes):
    images = str(pictures(folder))
    settings = {"stages": [Stage(3, 2, 8), Stage(None, 3, 12)], "epoch_steps": 5, "workers": 0}
    return RestorationData(images, validation={"a": ValidationSet(images)}, **(settings | changes))


def make_run(root):
    return Run.create(root, text="task: tiny\n", config={"task": "tiny"}, hash="tiny")


def make_trainer(run, callbacks=(), *, every=2, **changes):
    """As recipes build it; `every` is the number of steps between checkpoints."""
    settings = {"max_steps": 9, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    settings |= {"log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False}
    keeping = [SaveOnSignal(run), LastCheckpoint(run.folder / "checkpoints", every)]
    loggers = tracking.loggers(run.folder, "csv")
    return Trainer(
        default_root_dir=run.folder,
        callbacks=[*callbacks, *keeping],
        logger=loggers,
        accelerator="cpu",
        **(settings | changes),
    )


def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def in_child(work, said):
    """Run `work()` in a forked process and return its exit code, -9 after SIGKILL.

    Forking a process that has everything imported costs a hundredth of starting one. What the child says goes to the
    file `said`.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with Path(said).open("a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
                try:
                    work()
                    code = 0
                except SystemExit as leaving:
                    code = leaving.code or 0
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
