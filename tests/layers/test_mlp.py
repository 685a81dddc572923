import torch
from torch.nn import functional as F

from zoo.layers.mlp import Mlp


def test_two_layers_around_an_exact_gelu():
    torch.manual_seed(0)
    mlp = Mlp(4, 6)
    x = torch.rand(2, 3, 4)
    hidden = F.gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias, approximate="none")
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias)
    assert mlp.fc1.weight.shape == (6, 4)
