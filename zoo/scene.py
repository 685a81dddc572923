"""The language of shapes world: its words and colours, scenes as plain data, and the outline of every shape.

A caption names one to three things and, between neighbours, how they lie to each other:

    caption    = thing {relation thing} ["on a" background "background"]
    thing      = ("a" | "an") [size] [texture] colour shape [motion]

such as "a large striped red circle left of a small blue star on a black background". Data are drawn from this grammar
and prompts are judged by it, so that both sides mean the same.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from zoo.errors import UserError

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {  # sRGB, 0 to 255
    "red": (222, 38, 38),
    "orange": (250, 140, 10),
    "yellow": (250, 222, 50),
    "green": (40, 165, 65),
    "cyan": (20, 205, 215),
    "blue": (40, 85, 225),
    "purple": (135, 50, 180),
    "pink": (250, 120, 190),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (128, 128, 128),
    "black": (14, 14, 14),
    "beige": (226, 206, 172),
    "brown": (92, 66, 58),
}
SIZES = {"small": 0.09, "medium": 0.135, "large": 0.2}  # radius as a share of the image's shorter side
TEXTURES = ("solid", "striped", "dotted")
SHADE = 0.6  # of stripes and dots, times the colour of their thing
RELATIONS = ("left of", "right of", "above", "below")
MOTIONS = {"moving left": (-1, 0), "moving right": (1, 0), "moving up": (0, -1), "moving down": (0, 1)}  # x, y; y down
MOST = 3  # things in a scene
HOLE = 0.5  # inner radius of a ring, as a share of its outer radius
_PERIOD = 0.095  # of stripes and dots, as a share of the image's side

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_SAME = {"grey": "gray", "to": "", "the": "", "a": "", "an": "", "with": "", "and": "", "is": "", "under": "below"}
_FIELDS = {  # word -> the attribute that it sets
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(TEXTURES, "texture"),
}
_PHRASES = {phrase.split()[0]: phrase for phrase in RELATIONS}
_WORDS = {*_FIELDS, *_SAME, *BACKGROUNDS, *" ".join([*RELATIONS, *MOTIONS, "on background"]).split()}
WORDS = tuple(sorted(_WORDS))  # all that a caption or a prompt may hold; tokenizers are built on them


@dataclass(frozen=True)
class Thing:
    """One object. None = the caption leaves it open.

    Attributes:
        shape: one of SHAPES.
        colour: one of COLOURS.
        size: one of SIZES.
        texture: one of TEXTURES.
        motion: one of MOTIONS; None = at rest.
    """

    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    texture: str | None = None
    motion: str | None = None

    def __str__(self) -> str:
        """The words of a caption, with their article."""
        words = [w for w in (self.size, self.texture, self.colour, self.shape, self.motion) if w]
        return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


@dataclass(frozen=True)
class Scene:
    """What a caption says.

    Attributes:
        things: one to three.
        relations: how each thing lies to the next one, one fewer than things.
        background: one of BACKGROUNDS, or None = left open.
    """

    things: tuple[Thing, ...]
    relations: tuple[str, ...] = ()
    background: str | None = None

    def __str__(self) -> str:
        """The caption."""
        parts = [str(self.things[0])]
        for relation, thing in zip(self.relations, self.things[1:], strict=True):
            parts += [relation, str(thing)]
        if self.background:
            parts.append(f"on a {self.background} background")
        return " ".join(parts)

    def mirrored(self) -> "Scene":
        """The same scene told from the other end."""
        relations = tuple(_OPPOSITE[relation] for relation in reversed(self.relations))
        return replace(self, things=self.things[::-1], relations=relations)

    @property
    def held_out(self) -> bool:
        """Whether this is one of the tenth of all captions that nothing is trained on.

        Both ways of telling a scene share their fate.
        """
        text = min(str(self), str(self.mirrored()))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 10 == 0


def parse(text: str) -> Scene:
    """Read a caption, in any case and with or without articles and punctuation.

    Args:
        text: such as "A large red circle to the left of a small blue star."

    Raises:
        UserError: the text is no caption of shapes world; the sentence says what is wrong.
    """
    words = [_SAME.get(word, word) for word in re.findall(r"[^\W\d_]+", text.lower())]
    words = [word for word in words if word]
    if unknown := unknown_words(text):
        raise UserError(f"caption {_short(text)!r}: shapes world does not know {_short(', '.join(unknown[:3]))}")
    background = None
    if words[-1:] == ["background"]:
        if len(words) < 3 or words[-2] not in BACKGROUNDS or words[-3] != "on":
            raise UserError(f"caption {_short(text)!r}: a background is told as 'on a white background'")
        background, words = words[-2], words[:-3]
    things, relations = [{}], []
    while words:
        word = words.pop(0)
        if word == "moving" and words and f"moving {words[0]}" in MOTIONS:
            things[-1]["motion"] = f"moving {words.pop(0)}"
        elif word in _PHRASES:
            if words[:1] == ["of"]:
                words.pop(0)
            relations.append(_PHRASES[word])
            things.append({})
        elif word in _FIELDS and _FIELDS[word] not in things[-1]:
            things[-1][_FIELDS[word]] = word
        else:
            raise UserError(f"caption {_short(text)!r}: {word!r} cannot stand where it stands")
    if not all("shape" in thing for thing in things):
        raise UserError(f"caption {_short(text)!r}: every thing needs a shape, one of {', '.join(SHAPES)}")
    if len(things) > MOST:
        raise UserError(f"caption {_short(text)!r}: at most {MOST} things, got {len(things)}")
    return Scene(tuple(Thing(**thing) for thing in things), tuple(relations), background)


def unknown_words(text: str) -> list[str]:
    """The words of a prompt that captions of shapes world never hold, each once."""
    words = re.findall(r"[^\s/]+", text.lower())
    return list(dict.fromkeys(word for word in words if _bare(word) and _bare(word) not in _WORDS))


def holds(relation: str, first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether two things lie as a relation says: by the axis on which their centres are further apart.

    Args:
        relation: one of RELATIONS.
        first: centre (x, y) of the thing named first; y points down.
        second: centre of the other one.
    """
    dx, dy = second[0] - first[0], second[1] - first[1]
    if relation in ("left of", "right of"):
        return abs(dx) >= abs(dy) and (dx > 0) == (relation == "left of")
    return abs(dy) >= abs(dx) and (dy > 0) == (relation == "above")


@cache
def outline(shape: str) -> np.ndarray | None:
    """Corners (n, 2) of a shape inside the unit circle, counted once around; None for circle and ring."""
    if shape == "square":
        return np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])
    if shape == "triangle":
        return np.array([(0.0, -0.95), (0.98, 0.8), (-0.98, 0.8)])
    if shape == "star":
        turn = np.arange(10) * np.pi / 5 - np.pi / 2
        reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.48)
        return np.stack([reach * np.cos(turn), reach * np.sin(turn) + 0.06], axis=1)
    if shape == "cross":
        a, b = 0.32, 0.97
        quarter = np.array([(a, -b), (a, -a), (b, -a)])
        turns = [np.array([(c, -s), (s, c)]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([quarter @ turn.T for turn in turns])
    return None


def coverage(shape: str, centre: Sequence[float], radius: float, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel a shape covers: antialiased over one pixel along its outline.

    Args:
        shape: one of SHAPES.
        centre: x and y, pixels from the top left corner of the image.
        radius: pixels.
        size: height and width of the image.

    Returns:
        float32 (h, w) in [0, 1].
    """
    covered = np.zeros(size, np.float32)
    reach = 1.15 * radius + 1  # of the star's points, and a pixel for the soft edge
    left, top = (max(0, int(c - reach)) for c in centre)
    right, bottom = (min(n, int(c + reach) + 1) for c, n in zip(centre, size[::-1], strict=True))
    if left < right and top < bottom:
        y, x = np.mgrid[top:bottom, left:right] + 0.5
        distance = signed_distance(shape, (x - centre[0]) / radius, (y - centre[1]) / radius)
        covered[top:bottom, left:right] = np.clip(0.5 - radius * distance, 0, 1)
    return covered


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of radius 1 around the origin; negative inside."""
    corners = outline(shape)
    if corners is None:
        reach = np.hypot(x, y)
        return reach - 1 if shape == "circle" else np.maximum(reach - 1, HOLE - reach)
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - along * ex) ** 2 + (py - along * ey) ** 2)
        if ay != by:  # a ray to the right crosses this edge: inside after an odd number of crossings
            inside ^= ((y < ay) != (y < by)) & (px < py * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def pattern(texture: str | None, centre: Sequence[float], side: int, size: tuple[int, int]) -> np.ndarray:
    """Where a texture is dark, antialiased; it is tied to the centre of its thing, so that it moves with it.

    Args:
        texture: one of TEXTURES; None = solid.
        centre: x and y, pixels from the top left corner.
        side: of the whole image, pixels, which stripes and dots are sized by.
        size: height and width of the result.

    Returns:
        float32 (h, w) in [0, 1].
    """
    if texture in (None, "solid"):
        return np.zeros(size, np.float32)
    period = _PERIOD * side
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    x, y = x - centre[0], y - centre[1]
    if texture == "striped":  # diagonal, so that no stripe hides in a row of pixels
        across = (x + y) / np.sqrt(2)
        off = np.abs(across - np.rint(across / period) * period)  # from the middle of the nearest dark stripe
        dark = 0.5 + period / 4 - off
    else:
        off = np.hypot(*(v - np.rint(v / period) * period for v in (x, y)))  # from the nearest dot
        dark = 0.5 + 0.3 * period - off
    return np.clip(dark, 0, 1).astype(np.float32)


def _bare(word: str) -> str:
    return word.strip(".,;:!?'\"()-")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
