"""Trainings of generators that take a second."""

import torch

from tests.pipelines.tiny import PARTS, VAE
from zoo.data.generation import GenerationData
from zoo.data.stages import Stage
from zoo.tasks.autoencoder import AutoencoderTask
from zoo.tasks.diffusion import DiffusionTask
from zoo.tasks.objectives import L1

ADAMW = {"class_path": "AdamW", "init_args": {"lr": 1e-2}}


def make_shapes(**changes):
    settings = {"stages": [Stage(None, 2, 32)], "validation": 4, "epoch_steps": 5, "workers": 0}
    return GenerationData(**(settings | changes))


def make_autoencoder(**changes):
    torch.manual_seed(0)
    keywords = {key: value for key, value in VAE.items() if key != "class_name"}
    settings = {"autoencoder": keywords, "objectives": [L1()], "optimizer": ADAMW}
    return AutoencoderTask(**(settings | changes))


def make_diffusion(scheduler=None, **changes):
    torch.manual_seed(0)
    parts = PARTS | ({} if scheduler is None else {"scheduler": scheduler})
    settings = {"pipeline": "StableDiffusionPipeline", "parts": parts, "train": ["unet", "text_encoder"]}
    settings |= {"optimizer": ADAMW, "steps": 2}
    return DiffusionTask(**(settings | changes))
