"""What channel attention takes from a whole image, also when the image is only seen in tiles."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class GlobalMean(nn.Module):
    """Mean over rows and columns, (b, c, h, w) -> (b, c, 1, 1); without parameters.

    A tile's own mean is not its image's, and moves the result by tenths of a dB: whoever works in tiles sets `gather`.

    Attributes:
        gather: None, or what is asked for the mean instead, with this module and the features of a batch of tiles.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gather: Callable[[GlobalMean, Tensor], Tensor] | None = None

    def forward(self, features: Tensor) -> Tensor:
        if self.gather is not None:
            return self.gather(self, features)
        return self.own(features)

    def own(self, features: Tensor) -> Tensor:
        """The mean of these features alone, whatever `gather` would say."""
        return features.mean((2, 3), keepdim=True)


class GlobalGram(GlobalMean):
    """Mean over pixels of the products of each two channels of a head, (b, heads c, h, w) -> (b, heads, c, c).

    In float32 or wider, also inside bf16 autocast.

    Args:
        num_heads: groups of channels that meet no other group.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def own(self, features: Tensor) -> Tensor:
        pixels = features.flatten(2).unflatten(1, (self.num_heads, -1))  # b heads c n
        pixels = pixels.to(torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(features.device.type, enabled=False):  # sums over all tiles drown in the 8 bits of bf16
            return pixels @ pixels.mT / pixels.shape[3]
