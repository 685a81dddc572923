"""Restorers computed as their published code computes them: one file a family, which defines `FORWARDS`."""

import copy
import importlib
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.linear import Linear
from zoo.layers.mlp import Mlp
from zoo.layers.pointwise import Pointwise
from zoo.models import family_of

Forwards = dict[type[nn.Module], Callable[..., Tensor]]  # class of ours -> what stands for its forward
PLAIN: Forwards = {
    Linear: nn.Linear.forward,
    Mlp: lambda self, tokens: self.fc2(F.gelu(self.fc1(tokens))),
    Pointwise: nn.Conv2d.forward,
}


def unfused(network: nn.Module) -> nn.Module:
    """The same network on the same weights, with the logits, masks, biases and copies of the published code."""
    twin = copy.deepcopy(network, {id(x): x for x in (*network.parameters(), *network.buffers())})
    forwards = PLAIN | importlib.import_module(f"restorer_cases.{family_of(network)}").FORWARDS
    for module in twin.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    return twin


def cut(image: Tensor, rows: int, columns: int) -> Tensor:
    """A map (b, h, w, c) to the tokens of its windows, ((b nw), rows columns, c)."""
    b, h, w, c = image.shape
    windows = image.view(b, h // rows, rows, w // columns, columns, c).permute(0, 1, 3, 2, 4, 5)
    return windows.contiguous().view(-1, rows * columns, c)


def merge(windows: Tensor, rows: int, columns: int, h: int, w: int) -> Tensor:
    """Undo `cut`."""
    image = windows.view(-1, h // rows, w // columns, rows, columns, windows.shape[2]).permute(0, 1, 3, 2, 4, 5)
    return image.contiguous().view(-1, h, w, windows.shape[2])


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """Softmax attention by the book: (b nw) heads n d, biases heads n m, masks nw n m -> (b nw) n (heads d)."""
    logits = q * (q.shape[3] ** -0.5 if scale is None else scale) @ k.mT
    logits = logits + bias
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return (torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2)


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """Biases of each pair, heads n m, of a table (rows, heads)."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous()
