"""Prompt adherence in shapes world: what is in a picture, and whether it is what the caption says. No network weights.

Things are found by colour against the background, sized and placed by their moments (area and centroid), and named by
analysis through synthesis: the shape whose drawing at that place explains the pixels best. What no drawing explains,
such as noise or blur, is no shape.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations

import numpy as np

from zoo.errors import UserError
from zoo.scene import BACKGROUNDS, COLOURS, SHADE, SHAPES, SIZES, Scene, coverage, holds, pattern

CORE = ("count", "colour", "shape", "size", "relation")  # what "all right" means
EXTRA = ("texture", "background")  # told beside it
_CONTRAST = 0.14  # RGB distance from the background at which a pixel belongs to a thing
_SPECK = 0.0025  # smaller areas, as a share of the image, are no things
_FAINT = 1.2  # contrast, summed over the channels, below which errors are measured against this instead
_UNEXPLAINED = 0.35  # of a thing's pixels, above which it has no shape


@dataclass(frozen=True)
class Found:
    """A thing in a picture.

    Attributes:
        shape: one of SHAPES, or None when no drawing explains it.
        colour: one of COLOURS.
        size: one of SIZES.
        texture: one of TEXTURES.
        centre: x and y, pixels.
        radius: pixels.
        unexplained: share of its pixels that the best drawing does not explain.
    """

    shape: str | None
    colour: str
    size: str
    texture: str
    centre: tuple[float, float]
    radius: float
    unexplained: float


@dataclass(frozen=True)
class Verdict:
    """Which attributes of a caption a picture has; what the caption leaves open is right."""

    count: bool
    colour: bool
    shape: bool
    size: bool
    relation: bool
    texture: bool
    background: bool

    @property
    def all(self) -> bool:
        """Count, colours, shapes, sizes and relations are right."""
        return all(getattr(self, name) for name in CORE)


def judge(image: np.ndarray, scene: Scene) -> Verdict:
    """Compare a picture with a caption.

    Args:
        image: uint8 or float in [0, 1], (h, w, 3), at least 32 pixels a side.
        scene: what the caption says, from `zoo.scene.parse`.

    Raises:
        UserError: the image is too small, or not RGB.
    """
    found, background = find(image)
    wanted = scene.things
    candidates = [_compared(order, scene) for order in permutations(found, len(wanted))] if len(found) < 7 else []
    missing = dict.fromkeys(("colour", "shape", "size", "relation", "texture"), False)
    best = max(candidates, key=lambda right: (sum(right[n] for n in CORE[1:]), right["texture"]), default=missing)
    fits = scene.background in (None, background)
    return Verdict(count=len(found) == len(wanted), background=fits, **best)


def adherence(pairs: Iterable[tuple[np.ndarray, Scene]]) -> dict[str, float]:
    """Shares of pictures that have each attribute, and "all" of CORE, in [0, 1].

    Args:
        pairs: pictures and what their captions say.

    Raises:
        UserError: there are none.
    """
    verdicts = [judge(image, scene) for image, scene in pairs]
    if not verdicts:
        raise UserError("prompt adherence: no pictures were given")
    names = ("all", *CORE, *EXTRA)
    return {name: sum(getattr(verdict, name) for verdict in verdicts) / len(verdicts) for name in names}


def find(image: np.ndarray) -> tuple[list[Found], str]:
    """The things in a picture, largest first, and its background.

    Args:
        image: as for `judge`.
    """
    pixels = _unit(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    off = np.linalg.norm(pixels - background, axis=2)
    parts = _components(off > _CONTRAST)
    parts = [part for part in parts if part.sum() >= _SPECK * off.size]
    found = [_identify(pixels, background, part) for part in parts]
    return sorted(found, key=lambda thing: -thing.radius), _nearest(background, BACKGROUNDS)


def _identify(pixels: np.ndarray, background: np.ndarray, part: np.ndarray) -> Found:
    rows, columns = (slice(max(0, v.min() - 4), v.max() + 5) for v in np.nonzero(part))
    corner, side = np.array([columns.start, rows.start]), min(part.shape)
    pixels, part = pixels[rows, columns], part[rows, columns]
    colour = min(COLOURS, key=lambda name: _off_colour(pixels[part], background, name))
    shades = _shades(colour)
    y, x = np.mgrid[: part.shape[0], : part.shape[1]] + 0.5
    # How far each pixel is on the way from the background to the nearer shade.
    ways = np.stack([(pixels - background) @ (s - background) / ((s - background) ** 2).sum() for s in shades])
    best = Found(None, colour, "small", "solid", (0.0, 0.0), 1.0, np.inf)
    for texture, way in (("solid", ways[0]), ("", ways.max(0))):
        amount = np.clip(way, 0, 1) * _dilated(part)
        area = max(float(amount.sum()), 1.0)
        middle = np.array([(amount * x).sum(), (amount * y).sum()]) / area
        for shape in SHAPES:
            unit_area, offset = _moments(shape)
            radius = float(np.sqrt(area / unit_area))
            centre = (middle - radius * offset).tolist()
            drawn = coverage(shape, centre, radius, part.shape)
            looks = [texture] if texture else ["striped", "dotted"]
            for look in looks:
                shade = shades[0] + pattern(look, centre, side, part.shape)[..., None] * (shades[1] - shades[0])
                model = background + drawn[..., None] * (shade - background)
                error = np.abs(pixels - model).sum() / (area * max(np.abs(shades[0] - background).sum(), _FAINT))
                if error < best.unexplained:
                    place = (float(centre[0] + corner[0]), float(centre[1] + corner[1]))
                    best = Found(shape, colour, "", look, place, radius, float(error))
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] * side / best.radius)))
    return replace(best, size=size, shape=best.shape if best.unexplained <= _UNEXPLAINED else None)


def _shades(colour: str) -> tuple[np.ndarray, np.ndarray]:
    bright = np.array(COLOURS[colour]) / 255
    return bright, SHADE * bright


def _off_colour(inside: np.ndarray, background: np.ndarray, colour: str) -> float:
    """Mean distance of pixels from what a thing of this colour can show: two shades, and mixtures at their edges."""
    bright, dark = _shades(colour)
    off = [_from_line(inside, *ends) for ends in ((background, bright), (background, dark), (bright, dark))]
    return float(np.min(off, axis=0).mean())


def _from_line(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Distance of points (n, 3) from the stretch between two colours."""
    way = end - start
    along = np.clip((points - start) @ way / (way @ way), 0, 1)
    return np.linalg.norm(points - start - along[:, None] * way, axis=1)


def _compared(order: Sequence[Found], scene: Scene) -> dict[str, bool]:
    """Which attributes are right when the found things, in this order, are those of the caption."""

    def right(name: str) -> bool:
        return all(
            getattr(thing, name) in (None, getattr(found, name))
            for thing, found in zip(scene.things, order, strict=True)
        )

    lie = (holds(relation, order[i].centre, order[i + 1].centre) for i, relation in enumerate(scene.relations))
    right_ones = {name: right(name) for name in ("colour", "shape", "size", "texture")}
    right_ones["shape"] &= all(found.shape is not None for found in order)
    return right_ones | {"relation": all(lie)}


@cache
def _moments(shape: str) -> tuple[float, np.ndarray]:
    """Area and centroid of a shape of radius 1 around the origin."""
    side, radius = 512, 200.0
    drawn = coverage(shape, (side / 2, side / 2), radius, (side, side)).astype(np.float64)
    y, x = np.mgrid[:side, :side] + 0.5 - side / 2
    total = drawn.sum()
    return float(total / radius**2), np.array([(drawn * x).sum(), (drawn * y).sum()]) / total / radius


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, neighbours by side or corner."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = np.max(
            [padded[i : i + mask.shape[0], j : j + mask.shape[1]] for i in range(3) for j in range(3)], axis=0
        )
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            return [labels == label for label in np.unique(labels) if label]
        labels = spread


def _dilated(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    h, w = mask.shape
    return np.any([padded[i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(colour - np.array(palette[name]) / 255)))


def _unit(image: np.ndarray) -> np.ndarray:
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 32:
        raise UserError(f"prompt adherence needs RGB images of at least 32 pixels a side, got {image.shape}")
    return image.astype(np.float64) / 255 if image.dtype == np.uint8 else np.asarray(image, np.float64)
