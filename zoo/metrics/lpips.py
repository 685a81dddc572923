"""LPIPS: how different two images look, by the features of a network that was trained to see; 0 = the same.

At five depths both images' features are scaled to length one at every pixel; their squared differences are weighed by
channel, averaged over pixels and added up. Source: Zhang et al. 2018, equation 1; richzhang/PerceptualSimilarity,
lpips/lpips.py (version 0.1), whose parameter names these are.

The numbers of the networks come from files that are fetched by hand; the weights by channel lie within torchmetrics.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import UserError
from zoo.metrics.psnr_ssim import Image, eight_bit
from zoo.models.weights import read_weights


class Trunk(NamedTuple):
    """The convolutions of a network up to its last feature map, each followed by a ReLU.

    Attributes:
        file: what torchvision, and everything that builds on it, calls the weights.
        smallest: the shortest side of an image of which the last map has a pixel.
        pool: side of the max-pooling with stride 2.
        slices: whether a slice begins with that, and (channels, kernel, stride, padding) of its convolutions.
    """

    file: str
    smallest: int
    pool: int
    slices: tuple[tuple[bool, tuple[tuple[int, int, int, int], ...]], ...]


def _vgg(pooled: bool, channels: int, number: int) -> tuple[bool, tuple[tuple[int, int, int, int], ...]]:
    return pooled, ((channels, 3, 1, 1),) * number


TRUNKS = {
    "alex": Trunk(
        "alexnet-owt-7be5be79.pth",
        31,
        3,
        (
            (False, ((64, 11, 4, 2),)),
            (True, ((192, 5, 1, 2),)),
            (True, ((384, 3, 1, 1),)),
            (False, ((256, 3, 1, 1),)),
            (False, ((256, 3, 1, 1),)),
        ),
    ),
    "vgg": Trunk(
        "vgg16-397923af.pth",
        16,
        2,
        (_vgg(False, 64, 2), _vgg(True, 128, 2), _vgg(True, 256, 3), _vgg(True, 512, 3), _vgg(True, 512, 3)),
    ),
}
_FEATURE = re.compile(r"features\.(\d+)\.(weight|bias)")


class LPIPS(nn.Module):
    """The network: two batches (b, 3, h, w) in [0, 1] -> distances (b,).

    Args:
        kind: "alex" or "vgg".
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        trunk = TRUNKS[kind]
        self.net, place, before = nn.Module(), 0, 3
        for number, (pooled, convs) in enumerate(trunk.slices):
            part = nn.Sequential()
            if pooled:
                part.add_module(str(place), nn.MaxPool2d(trunk.pool, 2))
                place += 1
            for channels, kernel, stride, padding in convs:
                part.add_module(str(place), nn.Conv2d(before, channels, kernel, stride, padding))
                part.add_module(str(place + 1), nn.ReLU())
                place, before = place + 2, channels
            self.net.add_module(f"slice{number + 1}", part)
            # Named as the authors' head, whose first part is a dropout.
            self.add_module(f"lin{number}", nn.ModuleDict({"model": nn.Sequential()}))
            head = nn.Conv2d(before, 1, 1, bias=False)
            self.get_submodule(f"lin{number}.model").add_module("1", head)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """The distance of each pair, (b,)."""
        a, b = ((2 * image - 1 - self.shift) / self.scale for image in (one, other))
        total = a.new_zeros(len(a))
        for number in range(len(TRUNKS[self.kind].slices)):
            part = self.net.get_submodule(f"slice{number + 1}")
            a, b = part(a), part(b)
            apart = (_unit(a) - _unit(b)).square()  # b c h w
            total = total + self.get_submodule(f"lin{number}.model.1")(apart).mean((1, 2, 3))
        return total

    def between(self, restored: Image, gt: Image, *, crop_border: int = 0) -> float | None:
        """The distance of two images as 8-bit files hold them.

        Args:
            restored: (c, h, w), c = 1 (seen as gray RGB) or 3, floating in [0, 1] or uint8.
            gt: the same shape.
            crop_border: pixels left out on all four sides.

        Returns:
            None where less is left than the network can look at.
        """
        place = next(self.parameters()).device
        pair = []
        for image in (restored, gt):
            levels = eight_bit(torch.as_tensor(image)).to(place)
            h, w = levels.shape[1:]
            levels = levels[None, :, crop_border : h - crop_border, crop_border : w - crop_border]
            if min(levels.shape[2:]) < TRUNKS[self.kind].smallest:
                return None
            pair.append((levels.float() / 255).expand(-1, 3, -1, -1))
        with torch.no_grad():
            return float(self(*pair))


def load(source: str | Path | None = None) -> LPIPS:
    """The network with weights from a file; its kind is read off them.

    Args:
        source: torchvision's AlexNet or VGG16, the whole state dict of the authors' `lpips`, or their small file of
            weights by channel; None = torchvision's AlexNet where torch.hub would have put it.

    Raises:
        FileNotFoundError: the file, or the network that belongs to it, is not here.
        UserError: it holds neither.
    """
    path = default_file("alex") if source is None else Path(source).expanduser()
    state = _read(path)
    kind = _kind(state)
    if kind is None:
        raise UserError(f"{path}: holds neither AlexNet nor VGG16 nor weights of LPIPS; give torchvision's file of one")
    if not any(key.startswith("net.") for key in state):  # weights by channel alone
        state = _named(_read(default_file(kind)), kind) | state
    if "lin0.model.1.weight" not in state:
        state |= _read(_heads(kind))
    network = LPIPS(kind).eval()
    wanted = network.state_dict()
    wrong = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} and {len(wrong) - 1} more are missing or misshaped; fetch the file again")
    network.load_state_dict({key: state[key] for key in wanted})
    return network.requires_grad_(False)


def default_file(kind: str) -> Path:
    """Where torch.hub keeps the weights of a network once somebody has fetched them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / TRUNKS[kind].file


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by the authors' names.

    Raises:
        FileNotFoundError: it is not here.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file {path} not found")
    state = {key.replace("lins.", "lin"): value for key, value in read_weights(path)[0].items()}
    return _named(state, _kind(state))


def _kind(state: Mapping[str, Tensor]) -> str | None:
    for first, sizes in (("net.slice1.0.weight", (11, 3)), ("lin2.model.1.weight", (384, 256))):
        if first in state:
            size = state[first].shape[-1] if first.startswith("net") else state[first].shape[1]
            return dict(zip(sizes, TRUNKS, strict=True)).get(size)
    size = state["features.0.weight"].shape[-1] if "features.0.weight" in state else 0
    return {11: "alex", 3: "vgg"}.get(size)


def _named(state: Mapping[str, Tensor], kind: str | None) -> dict[str, Tensor]:
    """The authors' names instead of torchvision's; other tensors stay."""
    if kind is None or "features.0.weight" not in state:
        return dict(state)
    names = [name.removeprefix("net.") for name in LPIPS(kind).state_dict() if name.startswith("net.")]
    by_place = {name.split(".", 1)[1]: name for name in names}
    found = {match[1] + "." + match[2]: value for key, value in state.items() if (match := _FEATURE.fullmatch(key))}
    return {f"net.{by_place[place]}": value for place, value in found.items() if place in by_place}


def _heads(kind: str) -> Path:
    """The authors' weights by channel, which torchmetrics brings along."""
    package = importlib.util.find_spec("torchmetrics")
    folder = Path(package.origin).parent if package and package.origin else Path()
    return folder / "functional" / "image" / "lpips_models" / f"{kind}.pth"


def _unit(features: Tensor) -> Tensor:
    """Length one at every pixel."""
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
