"""Inception-v3 as published FIDs are measured with it: the TensorFlow graph of 2015-12-05, its pool of 2048 features.

Paper: Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision". Official weights for PyTorch:
https://github.com/mseitzer/pytorch-fid (Apache-2.0), pt_inception-2015-12-05-6726825d.pth. The classifier is left out.
Images are resized as clean-fid (Parmar et al. 2022) showed that they must be: bicubic, antialiased, in floats.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.models.entry import Entry, Variant, constructor_arguments

_SIDE = 299  # pixels
_CLASSES = 1008  # of this graph's classifier; torchvision's network, another one, has 1000

Kernel = int | tuple[int, int]
Branch = Sequence[Sequence[tuple[str, int, Kernel]]]  # steps, of convolutions side by side: name, channels, kernel


class Inception(nn.Module):
    """(b, 3, h, w) in [0, 1], any size -> (b, 2048)."""

    num_features = 2048

    def __init__(self) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        self.config = config
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        self.Mixed_5b = _local(192, pooled=32)
        self.Mixed_5c = _local(256, pooled=64)
        self.Mixed_5d = _local(288, pooled=64)
        self.Mixed_6a = _Mixed(288, [_chain("branch3x3", (384, 3)), _triple()], stride=2)
        self.Mixed_6b = _crossed(128)
        self.Mixed_6c = _crossed(160)
        self.Mixed_6d = _crossed(160)
        self.Mixed_6e = _crossed(192)
        wide = _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))
        self.Mixed_7a = _Mixed(768, [_chain("branch3x3", (192, 1), (320, 3)), wide], stride=2)
        self.Mixed_7b = _split(1280, "mean")
        self.Mixed_7c = _split(2048, "max")  # an oddity of this graph

    def forward(self, image: Tensor) -> Tensor:
        """The features of images."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"Inception: image must be (b, 3, h, w), got {tuple(image.shape)}")
        if image.shape[2:] != (_SIDE, _SIDE):
            image = F.interpolate(image, (_SIDE, _SIDE), mode="bicubic", antialias=True)
        x = self.Conv2d_1a_3x3((image * 255 - 128) / 128)
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x)), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))  # b c


class _Conv(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, before: int, width: int, kernel: Kernel, *, stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (h // 2, w // 2) if padded else 0
        self.conv = nn.Conv2d(before, width, (h, w), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side and a pool, joined along channels; with stride 2 the last step of every branch halves."""

    def __init__(
        self, before: int, branches: Sequence[Branch], *, pool: str = "max", pooled: int = 0, stride: int = 1
    ) -> None:
        super().__init__()
        self.branches = [[[name for name, _, _ in step] for step in branch] for branch in branches]
        self.pool, self.stride = pool, stride
        for branch in branches:
            width = before
            for step in branch:
                last = step is branch[-1] and stride == 2
                for name, out, kernel in step:
                    setattr(self, name, _Conv(width, out, kernel, stride=2 if last else 1, padded=not last))
                width = sum(out for _, out, _ in step)
        self.branch_pool = _Conv(before, pooled, 1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for branch in self.branches:
            part = x
            for step in branch:
                part = torch.cat([getattr(self, name)(part) for name in step], 1)
            parts.append(part)
        if self.pool == "mean":  # without the zeros of the border, as TensorFlow has it
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, self.stride, 1 if self.stride == 1 else 0)
        return torch.cat([*parts, self.branch_pool(pooled)], 1)


def _chain(name: str, *steps: tuple[int, Kernel]) -> Branch:
    """Convolutions one after the other, of (channels, kernel)."""
    return [[(f"{name}_{n}" if len(steps) > 1 else name, *step)] for n, step in enumerate(steps, 1)]


def _triple() -> Branch:
    return _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))


def _local(before: int, pooled: int) -> _Mixed:
    branches = [_chain("branch1x1", (64, 1)), _chain("branch5x5", (48, 1), (64, 5)), _triple()]
    return _Mixed(before, branches, pool="mean", pooled=pooled)


def _crossed(c: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    once = _chain("branch7x7", (c, 1), (c, row), (192, column))
    twice = _chain("branch7x7dbl", (c, 1), (c, column), (c, row), (c, column), (192, row))
    return _Mixed(768, [_chain("branch1x1", (192, 1)), once, twice], pool="mean", pooled=192)


def _split(before: int, pool: str) -> _Mixed:
    def fork(name: str) -> Sequence[tuple[str, int, Kernel]]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    once = [*_chain("branch3x3_1", (384, 1)), fork("branch3x3_2")]
    twice = [*_chain("branch3x3dbl", (448, 1), (384, 3)), fork("branch3x3dbl_3")]
    return _Mixed(before, [_chain("branch1x1", (320, 1)), once, twice], pool=pool, pooled=192)


VARIANTS = {"inception-2015": Variant({})}


def detect(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """No keywords for weights of this graph; None when they are another family's."""
    if "Mixed_7c.branch3x3dbl_3b.conv.weight" not in state_dict:
        return None
    if "fc.weight" in state_dict and len(state_dict["fc.weight"]) != _CLASSES:
        raise KeyError(f"fc.weight, which has {_CLASSES} rows in the graph that FID is measured with")
    return {}


def convert(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the classifier."""
    return {key: value for key, value in state_dict.items() if not key.startswith("fc.")}


ENTRY = Entry(network=Inception, variants=VARIANTS, detect=detect, convert=convert)
