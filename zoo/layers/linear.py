"""Linear layers that use the CPU's widest registers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What torch.compile itself puts in the place of a linear layer on the CPU; absent from builds without oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Multiply by `weight`, (c', c), and add `bias`; then take the exact GELU if asked for. (..., c) -> (..., c').

    Without gradients, float32 on a CPU goes to oneDNN, which does all of it in one pass. torch's own way is MKL, which
    leaves half of the registers of AMD's processors unused: 1.1 to 1.5 times the time for 144 to 540 channels.
    """
    plain = x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if plain or traced or _ONEDNN is None or not x.numel():
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else out
    return _ONEDNN(x, weight, bias, "gelu" if gelu else "none", [], "none")  # the last: no tanh in its place


class Linear(nn.Linear):
    """nn.Linear through `linear`; the same parameters."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        return linear(x, self.weight, self.bias, gelu)
