"""1x1 convolutions as what they are: one matrix for every pixel."""

from torch import Tensor, nn

from zoo.layers.linear import linear


class Pointwise(nn.Conv2d):
    """A 1x1 convolution by matrix product, faster on channels-last maps; its weights are those of nn.Conv2d.

    Args:
        in_channels: of the input (b, c, h, w).
        out_channels: of the output.
        bias: whether there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        return linear(features.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)
