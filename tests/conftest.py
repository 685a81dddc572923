import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist fills the cores; nested threads only slow each other
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel module is imported
torch.set_num_threads(1)
