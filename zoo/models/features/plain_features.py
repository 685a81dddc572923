"""A plain chain of 3x3 convolutions from an image to one vector: what FID and KID of shapes world are measured with.

No paper: it is to shapes world what Inception-v3 is to photos, trained by `zoo fit shapes-features`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.models.entry import Entry, Variant, check_sizes, constructor_arguments, count


class PlainFeatures(nn.Module):
    """(b, in_chans, h, w) in [0, 1], at least 32 pixels a side -> (b, num_features), mean 0 and variance 1 in each row.

    Images are resized to one side first, so that a thing looks the same at every resolution of the whole picture.

    Args:
        in_chans: image channels.
        widths: channels of each stage, which halves the image.
        depths: convolutions in each stage.
        num_features: length of the vector.
        side: that images are resized to, antialiased, pixels.

    Raises:
        ValueError: a keyword is outside its range.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        widths: Sequence[int] = (24, 48, 96, 128),
        depths: Sequence[int] = (1, 2, 2, 1),
        num_features: int = 128,
        side: int = 64,
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        check_sizes("PlainFeatures", in_chans=in_chans, num_features=num_features, side=side)
        if len(widths) != len(depths) or not widths or min(*widths, *depths) < 1:
            raise ValueError(f"PlainFeatures: each stage needs a width and a depth >= 1, got {widths} and {depths}")
        self.config, self.in_chans, self.num_features, self.side = config, in_chans, num_features, side
        stages = []
        for before, width, depth in zip([in_chans, *widths], widths, depths, strict=False):
            steps = [_Step(before, width, stride=2), *(_Step(width, width) for _ in range(depth - 1))]
            stages.append(nn.Sequential(*steps))
        self.stages = nn.Sequential(*stages)
        self.project = nn.Linear(widths[-1], num_features)

    def forward(self, image: Tensor) -> Tensor:
        """The vectors of images."""
        b, c, h, w = image.shape
        if c != self.in_chans or min(h, w) < 32:
            raise ValueError(
                f"PlainFeatures: image must be (b, {self.in_chans}, h, w) from 32x32 up, got {(b, c, h, w)}"
            )
        if (h, w) != (self.side, self.side):
            image = F.interpolate(image, (self.side, self.side), mode="bicubic", antialias=True)
        pooled = self.stages(image * 2 - 1).mean((2, 3))  # b c
        features = self.project(pooled)
        # One scale for all networks that are trained so: without it, FID would depend on how large the weights grew.
        return F.layer_norm(features, features.shape[1:])


class _Step(nn.Module):
    """Convolution, norm, activation."""

    def __init__(self, before: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


VARIANTS = {"shapes-features": Variant({})}


def detect(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor keywords read off the weights; None when they are another family's."""
    if "stages.0.0.conv.weight" not in state_dict or "project.weight" not in state_dict:
        return None
    first = [state_dict[f"stages.{n}.0.conv.weight"] for n in range(count(state_dict, "stages."))]
    return {
        "in_chans": first[0].shape[1],
        "widths": [weight.shape[0] for weight in first],
        "depths": [count(state_dict, f"stages.{n}.") for n in range(len(first))],
        "num_features": state_dict["project.weight"].shape[0],
    }


ENTRY = Entry(network=PlainFeatures, variants=VARIANTS, detect=detect, convert=dict, hidden=frozenset({"side"}))
