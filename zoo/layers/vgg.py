"""The convolutions of VGG19, for losses that compare features."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

CONVS = (2, 2, 4, 4, 4)  # in each block; a pool follows each
NAMES = [f"conv{block}_{n}" for block, count in enumerate(CONVS, 1) for n in range(1, count + 1)]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, RGB


class VGG19(nn.Module):
    """The features of VGG19 without batch norm, and without its classifier; parameter names are torchvision's.

    Source: Simonyan and Zisserman 2015, "Very Deep Convolutional Networks", configuration E.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for block, count in enumerate(CONVS):
            width = min(64 * 2**block, 512)
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, image: Tensor, names: Collection[str]) -> dict[str, Tensor]:
        """What convolutions give, before their ReLU.

        Args:
            image: (b, 3, h, w) or (b, 1, h, w) in [0, 1]; the deepest layers need sides of 16.
            names: of NAMES, such as "conv5_4".

        Returns:
            name -> (b, c, h / 2^(block - 1), w / 2^(block - 1)).
        """
        mean, std = (torch.tensor(values).to(image)[:, None, None] for values in (_MEAN, _STD))
        x = (image - mean) / std
        wanted, found = iter(NAMES), {}
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d) and (name := next(wanted)) in names:
                found[name] = x
                if len(found) == len(names):
                    break
        return found
