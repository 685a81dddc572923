"""FID and KID: how far the features of one set of images lie from those of another set; lower is better.

The sums are torchmetrics' in float64. Features come from any feature network that zoo can load, such as
`shapes-features`, which is shipped. Numbers of different networks, and FIDs of different numbers of images, must not be
compared; so every score says both.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from zoo import models
from zoo.errors import UserError

DEFAULT = "shapes-features"
SUBSETS = 50  # that KID compares
_BATCH = 32
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

Images = Tensor | Iterable[Tensor | np.ndarray]


@dataclass(frozen=True)
class Score:
    """One number with how it was measured.

    Attributes:
        metric: "FID" or "KID".
        protocol: network, numbers of images and subsets.
        value: None where the weights are missing, or too few images were given.
        spread: standard deviation over subsets, of KID.
        missing: what there is to say where there is no value.
    """

    metric: str
    protocol: str
    value: float | None
    spread: float | None = None
    missing: str = ""

    @property
    def label(self) -> str:
        """Name of the number, such as "FID (shapes-features, 2,000 images)"."""
        return f"{self.metric} ({self.protocol})"

    def __str__(self) -> str:
        """The number alone, or n/a and why."""
        if self.value is None:
            return f"n/a ({self.missing})"
        return f"{self.value:.4g}" + (f" ± {self.spread:.2g}" if self.spread is not None else "")


def scores(
    images: Images,
    real: Images,
    network: str | Path | nn.Module = DEFAULT,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """FID and KID of a set of images; without the network's weights, or with too few images, why there are none.

    Args:
        images: those that are judged; as for `features`.
        real: those that they should resemble; or what `features` made of them with this network, (m, d).
        network: as for `features`.
        progress: called with the number of images seen, of both sets together.

    Raises:
        UserError: images that are none, or a network for something else.
    """
    try:
        found = feature_network(network)
    except FileNotFoundError as error:
        return [Score(metric, str(network), None, missing=str(error)) for metric in ("FID", "KID")]
    ours = features(images, found, progress=progress)
    if isinstance(real, Tensor) and real.ndim == 2:
        theirs = real
    else:
        theirs = features(real, found, progress=progress and (lambda seen: progress(len(ours) + seen)))
    counts = f"{len(ours):,}" + (f" and {len(theirs):,}" if len(ours) != len(theirs) else "")
    protocol = f"{_name(network, found)}, {counts} images"
    subsets = f"{SUBSETS} subsets of {subset_size(len(ours), len(theirs)):,}"
    return [
        _scored("FID", protocol, lambda: (fid(ours, theirs), None)),
        _scored("KID", f"{protocol}, {subsets}", lambda: kid(ours, theirs)),
    ]


def fid(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians with the means and covariances of the features.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    Args:
        a: (n, d).
        b: (m, d).

    Raises:
        UserError: not more images than features, where covariances have no full rank and FID says little.

    Source: Heusel et al. 2017, equation 6.
    """
    a, b = _checked(a, b)
    count, width = min(len(a), len(b)), a.shape[1]
    if count <= width:
        raise UserError(f"FID: {width} features need more than {width} images on each side, got {count}; give more")
    metric = FrechetInceptionDistance(_Given(width))
    metric.update(a, real=False)
    metric.update(b, real=True)
    return max(0.0, metric.compute().item())  # of equal sets, rounding leaves a little on either side of 0


def kid(a: Tensor, b: Tensor, *, subsets: int = SUBSETS, size: int | None = None, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x y / d + 1)^3, unbiased: it may be negative.

    Args:
        a: (n, d).
        b: (m, d).
        subsets: how many pairs of random subsets are compared.
        size: images of each; None = `subset_size`.
        seed: which subsets.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        UserError: fewer than 2 images in a subset, or more than there are.

    Source: Binkowski et al. 2018, section 4.
    """
    a, b = _checked(a, b)
    count = min(len(a), len(b))
    size = subset_size(len(a), len(b)) if size is None else size
    if not 2 <= size <= count or subsets < 1:
        raise UserError(f"KID: {subsets} subsets of {size} cannot be taken of {count} images; give more images")
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", ".*will save all extracted features")
        torch.manual_seed(seed)  # torchmetrics draws from the global generator
        metric = KernelInceptionDistance(_Given(a.shape[1]), subsets=subsets, subset_size=size)
        metric.update(a, real=False)
        metric.update(b, real=True)
        mean, spread = metric.compute()
    return mean.item(), spread.item()


def subset_size(n: int, m: int) -> int:
    """How many images KID takes at a time of n and m: half of the smaller set, at most the usual 1,000."""
    return min(1000, min(n, m) // 2)


def features(
    images: Images, network: str | Path | nn.Module = DEFAULT, *, progress: Callable[[int], None] | None = None
) -> Tensor:
    """What a network sees in images, (n, d) float64 on the CPU.

    Args:
        images: one after the other or (n, 3, h, w), all of one size: arrays (h, w, 3), uint8 or in [0, 1], or tensors
            (3, h, w) in [0, 1]; fractions are clamped and rounded to 8 bits, as they would be in a file.
        network: name of a variant, weight file, run folder, or a module with `num_features` that makes
            (b, num_features) of (b, 3, h, w) in [0, 1].
        progress: called with the number of images seen.

    Raises:
        FileNotFoundError: the weights are not here.
        UserError: no images, images that are none, or a network for something else.
    """
    net = feature_network(network)
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    was_training, rows, seen = net.training, [], 0
    net.eval()
    try:
        with torch.inference_mode():
            for batch in _batches(images):
                rows.append(net(batch.to(device)).double().cpu())
                seen += len(batch)
                if progress is not None:
                    progress(seen)
    finally:
        net.train(was_training)
    if not rows:
        raise UserError("FID: no images were given")
    return torch.cat(rows)


def feature_network(source: str | Path | nn.Module) -> nn.Module:
    """The network that `source` means; see `features`.

    Raises:
        FileNotFoundError: the weights are not here.
        UserError: an unknown name, or a network for something else.
    """
    if isinstance(source, nn.Module):
        network = source
    elif Path(source).suffix in _WEIGHT_FILES and not Path(source).expanduser().is_file():
        raise FileNotFoundError(f"weights file {source} not found; give a file, or {DEFAULT}, which is shipped")
    else:
        network = models.load(source)
    if not isinstance(getattr(network, "num_features", None), int):
        raise UserError(f"FID: {_name(source, network)} is no feature network; give {DEFAULT} or a file of one")
    return network


class _Given(nn.Module):
    """Stands where torchmetrics wants a network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (n, d) and (m, d), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UserError("FID: features are not all numbers; the network's weights are damaged")
    return a.double(), b.double()


def _batches(images: Images) -> Iterator[Tensor]:
    """(b, 3, h, w) float32 in [0, 1], as 8-bit files hold them."""
    stream = iter(images)
    while some := list(islice(stream, _BATCH)):
        tensors: Sequence[Tensor] = [_unit(image) for image in some]
        if len({tensor.shape for tensor in tensors}) > 1:
            raise UserError("FID: images of one set must have one size; resize or crop them first")
        yield torch.stack(list(tensors))


def _unit(image: Tensor | np.ndarray) -> Tensor:
    given = image
    if isinstance(image, np.ndarray) and image.ndim == 3:
        image = torch.from_numpy(image).permute(2, 0, 1)
        image = image / 255 if image.dtype == torch.uint8 else image
    if not (isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 3 and image.shape[0] == 3):
        kind = f"{getattr(given, 'dtype', type(given).__name__)} {tuple(getattr(given, 'shape', ()))}"
        raise UserError(f"FID: images are arrays (h, w, 3) or tensors (3, h, w) in [0, 1], got {kind}")
    if not torch.isfinite(image).all():
        raise UserError("FID: an image holds values that are not numbers; look at what made it")
    return (image.detach().float().cpu().clamp(0, 1) * 255).round() / 255


def _scored(metric: str, protocol: str, measure: Callable[[], tuple[float, float | None]]) -> Score:
    try:
        return Score(metric, protocol, *measure())
    except UserError as error:
        return Score(metric, protocol, None, missing=str(error))


def _name(source: str | Path | nn.Module, network: nn.Module) -> str:
    """What a reader would call a network."""
    return getattr(network, "variant", None) or (
        type(network).__name__ if isinstance(source, nn.Module) else Path(source).name
    )
