"""Measures restorers on images with ground truth: what `zoo evaluate` and `zoo compare` do, callable from Python."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo import media, shipped
from zoo.data.degradations import Degradation, Jpeg, Noise
from zoo.data.images import to_array, to_tensor
from zoo.data.imresize import enlarged
from zoo.data.pairs import Pair, open_pairs
from zoo.errors import UserError, nearest
from zoo.metrics.psnr_ssim import Image, Protocol, rgb_to_y
from zoo.models import needs
from zoo.pipelines.restoring import prepare, restore_tensor
from zoo.pipelines.tiling import TileProgress

BICUBIC = "bicubic"
PROTOCOLS = ("basicsr", "rgb", "matlab")
_STEP = re.compile(r"jpeg(\d+)|noise(\d+(?:\.\d+)?)")

ImageProgress = Callable[[float, int, str], None]  # images done (parts count), images in all, name of the current one


@dataclass(frozen=True)
class MatlabProtocol(Protocol):
    """As old MATLAB tables: luma is rounded to 8 bits before the comparison, which moves PSNR by hundredths of a dB."""

    def label(self, metric: str = "PSNR") -> str:
        """Name of the number, such as "PSNR-Y rounded, crop 2, uint8"."""
        return f"{metric}-Y rounded, crop {self.crop_border}, uint8"

    def __str__(self) -> str:
        """The label of PSNR."""
        return self.label()

    def psnr(self, restored: Image, gt: Image) -> float:
        """PSNR of the rounded lumas."""
        return Protocol(self.crop_border).psnr(_rounded_luma(restored), _rounded_luma(gt))

    def ssim(self, restored: Image, gt: Image) -> float:
        """SSIM of the rounded lumas."""
        return Protocol(self.crop_border).ssim(_rounded_luma(restored), _rounded_luma(gt))


@dataclass(frozen=True)
class Row:
    """One image.

    Attributes:
        image: its name.
        width: of the ground truth, pixels.
        height: of the ground truth, pixels.
        psnr: of the model, dB.
        ssim: of the model; None below 11 pixels a side.
        bicubic_psnr: of bicubic enlargement of the same input (of the input itself at upscale 1), dB.
        bicubic_ssim: likewise.
        seconds: wall time of the model.
    """

    image: str
    width: int
    height: int
    psnr: float
    ssim: float | None
    bicubic_psnr: float
    bicubic_ssim: float | None
    seconds: float

    @property
    def gain(self) -> float:
        """PSNR above bicubic, dB; 0 where both are perfect."""
        return 0.0 if self.psnr == self.bicubic_psnr else self.psnr - self.bicubic_psnr


@dataclass(frozen=True)
class Scores:
    """One model on one set of images.

    Attributes:
        model: its label.
        data: where the images come from.
        upscale: gt size over lq size.
        degradation: how lq was made, such as "bicubic+jpeg75".
        protocol: how the numbers are computed; printed with every one.
        rows: one per image.
    """

    model: str
    data: str
    upscale: int
    degradation: str
    protocol: Protocol
    rows: list[Row] = field(repr=False)

    @property
    def psnr(self) -> float:
        """Mean over the images, dB."""
        return sum(row.psnr for row in self.rows) / len(self.rows)

    @property
    def bicubic_psnr(self) -> float:
        """Mean of bicubic over the images, dB."""
        return sum(row.bicubic_psnr for row in self.rows) / len(self.rows)

    @property
    def gain(self) -> float:
        """Mean PSNR above bicubic, dB."""
        return sum(row.gain for row in self.rows) / len(self.rows)

    @property
    def ssim(self) -> float | None:
        """Mean over the images that have one."""
        return _mean([row.ssim for row in self.rows])

    @property
    def bicubic_ssim(self) -> float | None:
        """Mean of bicubic over the images that have one."""
        return _mean([row.bicubic_ssim for row in self.rows])


class Trial:
    """Models and images, ready to be measured; models and images are checked here, before any work.

    Args:
        models: names, weight files, run folders, networks, or "bicubic".
        data: "photos" (the validation photos), "demo", or a folder: of gt images, or of pairs.
        upscale: gt size over lq size; None = that of the models.
        degradation: "bicubic" (with upscale 1: nothing), followed by +jpegQ or +noiseS; applied to given lq files too.
        protocol: "basicsr" (Y for super-resolution, RGB at upscale 1; border = upscale), "rgb" or "matlab".
        split: "train" or "valid", where the data have both.
        lq: folder of degraded images, where no known layout says it.
        template: lq name for a gt name, such as "{}x4".
        tile: as for `zoo.restore`.
        device: as for `zoo.restore`.
        dtype: as for `zoo.restore`.

    Raises:
        FileNotFoundError: weights or images are missing.
        UserError: unknown names, or models and images that do not fit each other.
    """

    def __init__(
        self,
        models: Sequence[str | Path | nn.Module],
        data: str = "photos",
        *,
        upscale: int | None = None,
        degradation: str = BICUBIC,
        protocol: str = "basicsr",
        split: str = "valid",
        lq: str | None = None,
        template: str | None = None,
        tile: int | str | None = "auto",
        device: str = "auto",
        dtype: str = "float32",
    ) -> None:
        self.tile, self.dtype = tile, dtype
        steps_of(degradation)  # its mistakes are told before weights are read
        given = [None if model == BICUBIC else prepare(model, device=device, dtype=dtype) for model in models]
        labels = _labels(models, given)
        self.networks = dict(zip(labels, given, strict=True))
        found = {needs(network).upscale for network in given if network is not None}
        found |= {upscale} if upscale is not None else set()
        if not found:
            raise UserError("bicubic alone does not tell the upscale; give it (--upscale 2)")
        if len(found) > 1:
            raise UserError(f"models and --upscale disagree ({sorted(found)}); measure one upscale at a time")
        self.upscale = found.pop()
        self.protocol = _protocol(protocol, self.upscale)
        channels = {needs(network).in_channels for network in given if network is not None} or {3}
        self.pairs = open_pairs(
            str(data), self.upscale, split=split, lq=lq, template=template, channels=1 if channels == {1} else 3
        )
        self.degrade_by(degradation)

    def degrade_by(self, degradation: str) -> None:
        """Make the inputs by another degradation from now on; see `Trial`.

        Raises:
            UserError: it cannot be read.
        """
        self.steps = steps_of(degradation)
        base = ["lq as given"] if self.pairs.has_lq else [BICUBIC] if self.upscale > 1 else []
        self.degradation = "+".join([*base, *degradation.split("+")[1:]]) or "none"

    def run(self, report: ImageProgress | None = None) -> list[Scores]:
        """Measure every model on every image.

        Args:
            report: called with the progress.
        """
        rows: dict[str, list[Row]] = {label: [] for label in self.networks}
        total = len(self.pairs) * len(rows)
        for number, pair in enumerate(self.pairs):
            lq, gt = self.degraded(pair), to_tensor(pair.gt)
            bicubic = self._measured(pair.name, enlarged(lq, self.upscale), gt)
            for place, (label, network) in enumerate(self.networks.items()):
                done = number * len(rows) + place

                def tiles(part: int, whole: int, done: int = done, name: str = pair.name) -> None:
                    if report is not None:
                        report(done + part / whole, total, name)

                began = time.monotonic()
                restored = self.restored(network, lq, tiles)
                seconds = time.monotonic() - began
                mine = bicubic if network is None else self._measured(pair.name, restored, gt)
                height, width = pair.gt.shape[:2]
                rows[label].append(Row(pair.name, width, height, *mine, *bicubic, seconds))
        source = self.pairs.source
        facts = (source, self.upscale, self.degradation, self.protocol)
        return [Scores(label, *facts, rows[label]) for label in rows]

    def degraded(self, pair: Pair) -> Tensor:
        """The input of the models, (c, h, w) in [0, 1] (with noise: beyond)."""
        lq = to_tensor(pair.lq)
        for step in self.steps:
            lq = step.fixed(lq)
        return lq

    def restored(self, network: nn.Module | None, lq: Tensor, tiles: TileProgress | None = None) -> Tensor:
        """What a model makes of `lq`, (c, h * upscale, w * upscale); None = bicubic."""
        if network is None:
            return enlarged(lq, self.upscale)
        return restore_tensor(network, lq[None], dtype=self.dtype, tile=self.tile, progress=tiles)[0]

    def figure(self, image: str, scores: Sequence[Scores]) -> np.ndarray:
        """Input, bicubic, every model and the ground truth of one image, with the most telling square magnified.

        The square is where two models differ most, or where the only model errs most. uint8 (h, w, 3).
        """
        pair = next(pair for pair in self.pairs if pair.name == image)
        lq, gt = self.degraded(pair), pair.gt
        networks = {BICUBIC: None} | {name: network for name, network in self.networks.items() if network}
        arrays = {name: to_array(self.restored(network, lq)) for name, network in networks.items()}
        values = {s.model: row.psnr for s in scores for row in s.rows if row.image == image}
        values[BICUBIC] = next(row.bicubic_psnr for row in scores[0].rows if row.image == image)
        labels = [f"{name}, {values[name]:.2f} dB" for name in arrays]
        models = [array for name, array in arrays.items() if name != BICUBIC] or [arrays[BICUBIC]]
        other = models[1] if len(models) > 1 else media.to_unit(gt)
        zoom = media.hot_spot(np.abs(models[0] - other).mean(axis=2), 64)
        last = models[-1]
        return media.side_by_side(
            [to_array(lq), *arrays.values(), gt, media.heat_map(last, gt)],
            [f"input ({self.degradation})", *labels, "ground truth", f"error of {labels[-1].split(',')[0]}, 0 to 0.1"],
            zoom=zoom,
            title=f"{image}: {self.protocol}",
        )

    def _measured(self, name: str, restored: Tensor, gt: Tensor) -> tuple[float, float | None]:
        if restored.shape[1] <= 2 * self.protocol.crop_border or restored.shape[2] <= 2 * self.protocol.crop_border:
            raise UserError(f"{name}: nothing is left of {gt.shape[2]}x{gt.shape[1]} after cropping; remove it")
        psnr = self.protocol.psnr(restored, gt)
        try:
            return psnr, self.protocol.ssim(restored, gt)
        except UserError:  # smaller than its window
            return psnr, None


def evaluate(model: str | Path | nn.Module, data: str = "photos", **options: Any) -> Scores:  # noqa: ANN401
    """Measure one model.

    Args:
        model: a name, weight file, run folder, network, or "bicubic".
        data: as for `Trial`.
        **options: keywords of `Trial`.
    """
    return Trial([model], data, **options).run()[0]


def compare(models: Sequence[str | Path | nn.Module], data: str = "photos", **options: Any) -> list[Scores]:  # noqa: ANN401
    """Measure several models on the same inputs.

    Args:
        models: as for `evaluate`.
        data: as for `Trial`.
        **options: keywords of `Trial`.
    """
    return Trial(models, data, **options).run()


def telling_image(scores: Sequence[Scores]) -> str:
    """The image worth a look: where two models differ most, or where one gains least over bicubic."""
    first = scores[0].rows
    if len(scores) == 1:
        return min(first, key=lambda row: row.gain).image
    spread = [max(values) - min(values) for values in zip(*[[r.gain for r in s.rows] for s in scores], strict=True)]
    return first[int(np.argmax(spread))].image


def recorded(model: str) -> list[str]:
    """What checkpoints/index.yaml has of a variant: the paper's figures and ours; one phrase each."""
    row = shipped.index().get(model, {})
    paper = [f"paper: {where} {value}" for where, value in (row.get("paper") or {}).items()]
    return paper + [f"{where}: {value}" for where, value in (row.get("figures") or {}).items()]


def _labels(models: Sequence[str | Path | nn.Module], networks: Sequence[nn.Module | None]) -> list[str]:
    """Short names, all different."""
    labels: list[str] = []
    for model, network in zip(models, networks, strict=True):
        text = (
            (getattr(network, "variant", None) or type(network).__name__)
            if isinstance(model, nn.Module)
            else str(model)
        )
        parts = Path(text).parts
        label = "/".join(parts[-2:]) if len(parts) > 1 else text
        if label in labels:
            label = next(f"{label} ({n})" for n in range(2, len(models) + 2) if f"{label} ({n})" not in labels)
        labels.append(label)
    return labels


def steps_of(degradation: str) -> list[Degradation]:
    """The steps after the shrinking that a text such as "bicubic+noise25+jpeg75" means.

    Raises:
        UserError: it cannot be read.
    """
    base, *parts = degradation.split("+")
    if base != BICUBIC:
        raise UserError(f"degradation {degradation!r}: begin with {BICUBIC}, such as bicubic+jpeg75 or bicubic+noise25")
    steps: list[Degradation] = []
    for part in parts:
        match = _STEP.fullmatch(part)
        if match is None:
            raise UserError(
                f"degradation {degradation!r}: {part!r} is neither jpegQ nor noiseS, with a whole Q, "
                "such as bicubic+jpeg75"
            )
        steps.append(Jpeg(int(match[1])) if match[1] else Noise(float(match[2])))
    return steps


def _protocol(name: str, upscale: int) -> Protocol:
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r} is not one of {', '.join(PROTOCOLS)}.{nearest(name, PROTOCOLS)}")
    border = upscale if upscale > 1 else 0
    if name == "matlab":
        return MatlabProtocol(border, y_channel=True)
    return Protocol(border, y_channel=name == "basicsr" and upscale > 1)


def _rounded_luma(image: Image) -> Tensor:
    """uint8 (1, h, w); a gray image as it is."""
    levels = torch.as_tensor(image)
    if levels.dtype != torch.uint8:
        levels = (levels.clamp(0, 1) * 255).round().to(torch.uint8)
    return rgb_to_y(levels.double() / 255).round().to(torch.uint8) if levels.shape[0] == 3 else levels


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
