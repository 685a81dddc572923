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

from zoo import media
from zoo.data.degradations import Degradation, Jpeg, Noise
from zoo.data.images import to_array, to_tensor
from zoo.data.imresize import enlarged
from zoo.data.pairs import Pair, open_pairs
from zoo.data.weather import Rain, Raindrops, Snow
from zoo.errors import UserError
from zoo.evaluate.protocols import Judge, mean, paper_figure, protocol_of
from zoo.metrics.psnr_ssim import Protocol
from zoo.models import needs
from zoo.pipelines.restoring import facts, prepare, restore_tensor
from zoo.pipelines.tiling import TileProgress

BICUBIC = "bicubic"
_NUMBER = r"\d+(?:\.\d+)?"
_STEP = re.compile(
    rf"jpeg(?P<quality>\d+)|noise(?P<sigma>{_NUMBER})|(?P<weather>rain|snow|raindrops)(?P<psnr>{_NUMBER})?"
)
_WEATHER = {"rain": Rain, "snow": Snow, "raindrops": Raindrops}

ImageProgress = Callable[[float, int, str], None]  # images done (parts count), images in all, name of the current one


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
        also: the judge's further measures by their key: of the model and of bicubic.
    """

    image: str
    width: int
    height: int
    psnr: float
    ssim: float | None
    bicubic_psnr: float
    bicubic_ssim: float | None
    seconds: float
    also: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

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
        labels: key of each further measure -> its name with its protocol.
        missing: key of a further measure -> why it has no value.
        paper: the authors' figure by this protocol on these images, where one is recorded.
    """

    model: str
    data: str
    upscale: int
    degradation: str
    protocol: Protocol
    rows: list[Row] = field(repr=False)
    labels: dict[str, str] = field(default_factory=dict, repr=False)
    missing: dict[str, str] = field(default_factory=dict, repr=False)
    paper: str | None = None

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
        return mean([row.ssim for row in self.rows])

    @property
    def bicubic_ssim(self) -> float | None:
        """Mean of bicubic over the images that have one."""
        return mean([row.bicubic_ssim for row in self.rows])

    def also(self, key: str) -> tuple[float | None, float | None]:
        """Means of a further measure over the images that have it: of the model and of bicubic."""
        ours, bicubic = zip(*[row.also[key] for row in self.rows], strict=True)
        return mean(ours), mean(bicubic)


@dataclass(frozen=True)
class Views:
    """What there is to see of one image, all of them (h, w, 3) or (h, w, 1), in [0, 1] or uint8.

    Attributes:
        lq: the input.
        restored: label with its PSNR -> what came out; bicubic (at upscale 1 the input) first.
        gt: the ground truth.
        hot: the most telling square (top, left, size): where two models differ most, or the only model errs most.
    """

    lq: np.ndarray
    restored: dict[str, np.ndarray]
    gt: np.ndarray
    hot: tuple[int, int, int]


class Trial:
    """Models and images, ready to be measured; models and images are checked here, before any work.

    Args:
        models: names, weight files, run folders, networks, or "bicubic".
        data: "photos" (the validation photos), "demo", or a folder: of gt images, or of pairs.
        upscale: gt size over lq size; None = that of the models.
        degradation: "bicubic" (with upscale 1: nothing), or steps after it such as "bicubic+jpeg75", "noise25", "rain"
            or "snow22" (dB); applied to given lq files too.
        protocol: "basicsr" (Y for super-resolution, RGB at upscale 1; border = upscale), "rgb", "matlab" or
            "histoformer" (the tables of its paper).
        split: "train" or "valid", where the data have both.
        lq: folder of degraded images, where no known layout says it.
        template: lq name for a gt name, such as "{}x4".
        tile: as for `zoo.restore`.
        padding: as for `zoo.restore`.
        device: as for `zoo.restore`.
        dtype: as for `zoo.restore`.
        ensemble: as for `zoo.restore`; papers mark such figures with a plus.
        lpips: weights for LPIPS, as for `zoo.metrics.lpips.load`; where they are not to be found it has no value.

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
        padding: str = "reflect",
        device: str = "auto",
        dtype: str = "float32",
        ensemble: bool = False,
        lpips: str | Path | None = None,
    ) -> None:
        self.how: dict[str, Any] = {"tile": tile, "padding": padding, "dtype": dtype, "ensemble": ensemble}
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
        self.protocol = protocol_of(protocol, self.upscale)
        gray = {needs(network).in_channels for network in given if network is not None} == {1}
        channels = 1 if gray else 3
        self.judge = Judge(self.protocol, channels=channels, lpips_file=lpips)
        self.pairs = open_pairs(str(data), self.upscale, split=split, lq=lq, template=template, channels=channels)
        self.degrade_by(degradation)

    def degrade_by(self, degradation: str) -> None:
        """Make the inputs by another degradation from now on; see `Trial`.

        Raises:
            UserError: it cannot be read.
        """
        self.steps = steps_of(degradation)
        base = ["lq as given"] if self.pairs.has_lq else [BICUBIC] if self.upscale > 1 else []
        self.degradation = "+".join([*base, *_parts(degradation)]) or "none"

    def run(self, report: ImageProgress | None = None) -> list[Scores]:
        """Measure every model on every image.

        Args:
            report: called with the progress.
        """
        rows: dict[str, list[Row]] = {label: [] for label in self.networks}
        total = len(self.pairs) * len(rows)
        for number, pair in enumerate(self.pairs):
            lq, gt = self.degraded(pair), to_tensor(pair.gt)
            bicubic = self.judge(pair.name, enlarged(lq, self.upscale), gt)
            for place, (label, network) in enumerate(self.networks.items()):
                done = number * len(rows) + place

                def tiles(part: int, whole: int, done: int = done, name: str = pair.name) -> None:
                    if report is not None:
                        report(done + part / whole, total, name)

                began = time.monotonic()
                restored = self.restored(network, lq, tiles)
                seconds = time.monotonic() - began
                ours = bicubic if network is None else self.judge(pair.name, restored, gt)
                height, width = pair.gt.shape[:2]
                main = (ours.psnr, ours.ssim, bicubic.psnr, bicubic.ssim)
                both = {key: (ours.also[key], bicubic.also[key]) for key in ours.also}
                rows[label].append(Row(pair.name, width, height, *main, seconds, both))
        about = (self.pairs.source, self.upscale, self.degradation, self.protocol)
        further = (self.judge.labels, self.judge.missing)
        return [Scores(label, *about, rows[label], *further, self._paper(label)) for label in rows]

    def degraded(self, pair: Pair) -> Tensor:
        """The input of the models, (c, h, w) in [0, 1] (with noise: beyond)."""
        lq = to_tensor(pair.lq)
        for step in self.steps:
            lq = step.fixed(lq, pair.name)
        return lq

    def restored(self, network: nn.Module | None, lq: Tensor, tiles: TileProgress | None = None) -> Tensor:
        """What a model makes of `lq`, (c, h * upscale, w * upscale); None = bicubic."""
        if network is None:
            return enlarged(lq, self.upscale)
        return restore_tensor(network, lq[None], **self.how, progress=tiles)[0]

    def views(self, image: str, scores: Sequence[Scores]) -> Views:
        """Everything there is to see of one image; every model runs once more."""
        pair = next(pair for pair in self.pairs if pair.name == image)
        lq = self.degraded(pair)
        networks = {BICUBIC: None} | {name: network for name, network in self.networks.items() if network}
        arrays = {name: to_array(self.restored(network, lq)) for name, network in networks.items()}
        values = {s.model: row.psnr for s in scores for row in s.rows if row.image == image}
        values[BICUBIC] = next(row.bicubic_psnr for row in scores[0].rows if row.image == image)
        models = [array for name, array in arrays.items() if name != BICUBIC] or [arrays[BICUBIC]]
        other = models[1] if len(models) > 1 else media.to_unit(pair.gt)
        hot = media.hot_spot(np.abs(models[0] - other).mean(axis=2), 64)
        shown = {f"{name}, {values[name]:.2f} dB": array for name, array in arrays.items()}
        return Views(to_array(lq), shown, pair.gt, hot)

    def figure(self, image: str, views: Views) -> np.ndarray:
        """Input, bicubic, every model and the ground truth, with the most telling square magnified. uint8 (h, w, 3)."""
        last = list(views.restored)[-1]
        error = f"error of {last.rsplit(',', 1)[0]}, 0 to 0.1"
        return media.side_by_side(
            [views.lq, *views.restored.values(), views.gt, media.heat_map(views.restored[last], views.gt)],
            [f"input ({self.degradation})", *views.restored, "ground truth", error],
            zoom=views.hot,
            title=f"{image}: {self.protocol}",
        )

    def facts(self) -> dict[str, str]:
        """What has to be known to measure the same again."""
        found = {"data": str(self.pairs.report()), "protocol": str(self.protocol)}
        for label, network in self.networks.items():
            if network is not None:
                about = facts(network, **self.how)
                found |= {"Software": about.pop("Software")} | {f"{label}: {k[4:]}": v for k, v in about.items()}
        return found | {"torch": torch.__version__}

    def _paper(self, label: str) -> str | None:
        """Only where the inputs are made as the paper's are."""
        if self.steps or self.how["ensemble"]:
            return None
        variant = getattr(self.networks[label], "variant", None)
        return paper_figure(variant, self.pairs.source, str(self.protocol))


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


def telling_images(scores: Sequence[Scores], most: int = 1) -> list[str]:
    """The images worth a look: where two models differ most, or where one gains least over bicubic; the worst first."""
    first = scores[0].rows
    if len(scores) == 1:
        order = np.argsort([row.gain for row in first], kind="stable")
    else:
        gains = np.array([[row.gain for row in score.rows] for score in scores])
        order = np.argsort(gains.min(0) - gains.max(0), kind="stable")
    return [first[place].image for place in order[:most]]


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
    """The steps after the shrinking that a text such as "bicubic+noise25+jpeg75" or "rain22" means.

    Raises:
        UserError: it cannot be read.
    """
    steps: list[Degradation] = []
    for part in _parts(degradation):
        match = _STEP.fullmatch(part)
        if match is None:
            raise UserError(
                f"degradation {degradation!r}: {part!r} is none of jpegQ, noiseS, rain, snow and raindrops, such as "
                "bicubic+jpeg75, noise25 or rain22 (dB)"
            )
        if match["quality"]:
            steps.append(Jpeg(int(match["quality"])))
        elif match["sigma"]:
            steps.append(Noise(float(match["sigma"])))
        else:
            weather = _WEATHER[match["weather"]]
            steps.append(weather(float(match["psnr"])) if match["psnr"] else weather())
    return steps


def _parts(degradation: str) -> list[str]:
    """Without the shrinking, which always comes first."""
    first, *rest = degradation.split("+")
    return rest if first == BICUBIC else [first, *rest]
