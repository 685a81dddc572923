"""The reconstruction head that most super-resolvers share."""

import math

from torch import nn

UPSCALES = (1, 2, 3, 4, 8)


class Upsample(nn.Sequential):
    """Convolution and pixel shuffle: once for x3, once per doubling for powers of two, empty for x1.

    Args:
        upscale: one of UPSCALES.
        num_feat: channels, in and out.

    Raises:
        ValueError: another upscale.

    Source: BasicSR, basicsr/archs/arch_util.py (parameter names `0`, `2`, ... are kept).
    """

    def __init__(self, upscale: int, num_feat: int) -> None:
        if upscale not in UPSCALES:
            raise ValueError(f"Upsample: upscale must be 1, 2, 3, 4 or 8, got {upscale}")
        factors = [3] if upscale == 3 else [2] * int(math.log2(upscale))
        layers: list[nn.Module] = []
        for factor in factors:
            layers += [nn.Conv2d(num_feat, factor**2 * num_feat, 3, padding=1), nn.PixelShuffle(factor)]
        super().__init__(*layers)


def upscale_of(shapes: list[int], num_feat: int) -> int:
    """The factor of an `Upsample` from the output widths of its convolutions, in order."""
    return 3 if shapes == [9 * num_feat] else 2 ** len(shapes)
