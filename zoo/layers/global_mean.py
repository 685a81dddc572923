"""The mean over an image that channel attention gates by, also when the image is only seen in tiles."""

from collections.abc import Callable

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
        return features.mean((2, 3), keepdim=True)
