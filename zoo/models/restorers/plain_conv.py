"""A plain chain of 3x3 convolutions with a pixel-shuffle head: the control that every other restorer has to beat.

No paper: residual-free layers in the manner of VDSR (Kim et al. 2016) at input resolution, with the head of HAT and
the enlarged input added to the output, so that the comparison is about the body alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from zoo.layers.pixel_shuffle import Upsample, upscale_of
from zoo.models.entry import Entry, Needs, Variant, check_sizes, constructor_arguments, count


class PlainConv(nn.Module):
    """(b, c, h, w) in [0, 1] -> (b, c, h*upscale, w*upscale), any size.

    Args:
        in_chans: image channels, in and out.
        embed_dim: width of the hidden layers.
        depth: hidden 3x3 convolutions, each followed by ReLU.
        num_feat: width of the reconstruction head.
        upscale: 1, 2, 3, 4 or 8.

    Raises:
        ValueError: a keyword is outside its range.
    """

    def __init__(
        self, *, in_chans: int = 3, embed_dim: int = 64, depth: int = 6, num_feat: int = 32, upscale: int = 2
    ) -> None:
        config = constructor_arguments(locals())
        super().__init__()
        check_sizes("PlainConv", in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_feat=num_feat)
        self.config, self.upscale, self.in_chans, self.depth = config, upscale, in_chans, depth
        self.embed_dim, self.num_feat = embed_dim, num_feat
        self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 3, padding=1) for _ in range(depth))
        self.conv_before_upsample = nn.Conv2d(embed_dim, num_feat, 3, padding=1)
        self.upsample = Upsample(upscale, num_feat)
        self.conv_last = nn.Conv2d(num_feat, in_chans, 3, padding=1)

    def forward(self, lq: Tensor) -> Tensor:
        """Restore `lq`, (b, in_chans, h, w) in [0, 1]."""
        features = F.relu(self.conv_first(lq))  # b c h w
        for conv in self.body:
            features = F.relu(conv(features))
        out = self.conv_last(self.upsample(F.relu(self.conv_before_upsample(features))))
        return out + F.interpolate(lq, size=out.shape[2:], mode="bicubic", align_corners=False)


VARIANTS = {"plain-conv-tiny-x2": Variant({"embed_dim": 54, "depth": 7, "num_feat": 32, "upscale": 2})}


def detect(state_dict: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Constructor keywords read off the weights; None when they are another family's."""
    if "body.0.weight" not in state_dict or "conv_before_upsample.weight" not in state_dict:
        return None
    embed_dim, in_chans = state_dict["conv_first.weight"].shape[:2]
    num_feat = state_dict["conv_before_upsample.weight"].shape[0]
    head = [v.shape[0] for k, v in state_dict.items() if k.startswith("upsample.") and k.endswith(".weight")]
    return {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": count(state_dict, "body."),
        "num_feat": num_feat,
        "upscale": upscale_of(head, num_feat),
    }


def _needs(network: PlainConv) -> Needs:
    head = network.num_feat * network.upscale**2 * 2
    return Needs(
        upscale=network.upscale,
        in_channels=network.in_chans,
        multiple=1,
        dtypes=("float32", "bfloat16", "float16"),
        overlap=network.depth + 4,  # the whole receptive reach, so that tiles are exact
        bytes_per_pixel=4 * (3 * network.embed_dim + head),
    )


ENTRY = Entry(network=PlainConv, variants=VARIANTS, detect=detect, convert=dict, needs=_needs)
