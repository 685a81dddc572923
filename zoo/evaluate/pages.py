"""The page of an evaluation: tables, the worst images under sliders, and how everything was measured, in one file."""

from collections.abc import Mapping, Sequence

import numpy as np

from zoo import report
from zoo.errors import UserError
from zoo.evaluate.protocols import recorded
from zoo.evaluate.restorers import BICUBIC, Scores, Views
from zoo.media import to_uint8, to_unit

_WIDEST = 1600  # pixels of a picture under a slider; of larger ones the part around the most telling square is shown


def page(tables: Sequence[Sequence[Scores]], worst: Sequence[Mapping[str, Views]], facts: Mapping[str, str]) -> str:
    """One HTML document without outside resources.

    Args:
        tables: for each degradation, the scores of every model.
        worst: for each degradation, image -> what there is to see of it.
        facts: how it was measured, by name.

    Raises:
        UserError: there are no tables.
    """
    if not tables:
        raise UserError("page: no scores were given; measure something first")
    sections: list[tuple[str, str]] = []
    for scores, views in zip(tables, worst, strict=True):
        first = scores[0]
        where = f"{first.data}, x{first.upscale}, input: {first.degradation}"
        sections.append((where, report.table(summary(scores)) + _remarks(scores)))
        if views:
            sections.append((f"The worst images of {where}", "".join(_seen(*item) for item in views.items())))
        sections.append((f"Every image of {where}", report.table(_rows(scores))))
    sections.append(("How it was measured", report.table([{"": k, "value": v} for k, v in facts.items()])))
    names = " and ".join(score.model for score in tables[0])
    return report.page(f"{names} on {tables[0][0].data}", sections)


def summary(scores: Sequence[Scores]) -> list[dict[str, str]]:
    """Means of bicubic and of every model, with the paper's figure; one row each."""
    first = scores[0]
    psnr, ssim = first.protocol.label("PSNR"), first.protocol.label("SSIM")
    found = []
    for score in (None, *(score for score in scores if score.model != BICUBIC)):
        values = (first.bicubic_psnr, first.bicubic_ssim) if score is None else (score.psnr, score.ssim)
        row = {"": _baseline(first) if score is None else score.model, psnr: _shown(values[0], 2, " dB")}
        row |= {"gain": "" if score is None else f"{score.gain:+.2f} dB"}
        row |= {"paper": (score and score.paper) or "", ssim: _shown(values[1], 4)}
        for key, label in first.labels.items():
            ours, bicubic = (score or first).also(key)
            row[label] = shown(key, bicubic if score is None else ours)
        row["seconds per image"] = "" if score is None else f"{np.mean([r.seconds for r in score.rows]):.2f}"
        found.append(row)
    return found if any(row["paper"] for row in found) else [_without(row, "paper") for row in found]


def shown(key: str, value: float | None) -> str:
    """One further measure as text."""
    return _shown(value, 2, " dB") if key.startswith("psnr") else _shown(value, 4)


def _rows(scores: Sequence[Scores]) -> list[dict[str, str]]:
    first = scores[0]
    found = []
    for place, one in enumerate(first.rows):
        row = {"image": one.image, "size": f"{one.width}x{one.height}"}
        for name, value, quality, also in _columns(scores, place):
            row |= {f"{name}: PSNR": _shown(value, 2), f"{name}: SSIM": _shown(quality, 4)}
            row |= {f"{name}: {key.replace('_', '-').upper()}": shown(key, v) for key, v in also.items()}
        found.append(row)
    return [{k: v for k, v in row.items() if any(other[k] != "n/a" for other in found)} for row in found]


def _columns(scores: Sequence[Scores], place: int) -> list[tuple[str, float, float | None, dict[str, float | None]]]:
    """Name, PSNR, SSIM and further measures of bicubic and of every model on one image."""
    one = scores[0].rows[place]
    found = [(_baseline(scores[0]), one.bicubic_psnr, one.bicubic_ssim, {k: v[1] for k, v in one.also.items()})]
    for score in scores:
        if score.model != BICUBIC:
            row = score.rows[place]
            found.append((score.model, row.psnr, row.ssim, {k: v[0] for k, v in row.also.items()}))
    return found


def _seen(image: str, views: Views) -> str:
    """The image's sliders: each model against bicubic, or two models against each other, and the last against gt."""
    labels, arrays = list(views.restored), list(views.restored.values())
    pairs = [(0, place) for place in range(1, len(labels))] if len(labels) < 3 else [(1, 2)]
    sliders = [
        report.slider(_part(arrays[a], views), _part(arrays[b], views), (f"{image}: {labels[a]}", labels[b]))
        for a, b in pairs
    ]
    gt = report.slider(_part(arrays[-1], views), _part(views.gt, views), (f"{image}: {labels[-1]}", "ground truth"))
    return "".join([*sliders, gt])


def _part(array: np.ndarray, views: Views) -> np.ndarray:
    """uint8 RGB of at most _WIDEST pixels a side, around the most telling square."""
    top, left, size = views.hot
    corners = []
    for first, length in ((top, array.shape[0]), (left, array.shape[1])):
        start = min(max(0, first + size // 2 - _WIDEST // 2), max(0, length - _WIDEST))
        corners.append(slice(start, start + _WIDEST))
    pixels = to_uint8(to_unit(array))[tuple(corners)]
    return np.ascontiguousarray(np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels)


def _remarks(scores: Sequence[Scores]) -> str:
    phrases = [f"{scores[0].labels[key]}: n/a ({why})" for key, why in scores[0].missing.items()]
    phrases += [f"{score.model}, on record: {phrase}" for score in scores for phrase in recorded(score.model)]
    return report.text("\n".join(phrases)) if phrases else ""


def _baseline(scores: Scores) -> str:
    return BICUBIC if scores.upscale > 1 else "input"


def _shown(value: float | None, digits: int, unit: str = "") -> str:
    return "n/a" if value is None else f"{value:.{digits}f}{unit}"


def _without(row: dict[str, str], key: str) -> dict[str, str]:
    return {k: v for k, v in row.items() if k != key}
