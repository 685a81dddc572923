"""Shapes world: endless captioned images and clips of a few coloured shapes, each a function of a seed and a number.

Nothing is stored and nothing is downloaded. What a caption means is fixed by `zoo.scene`, so that a picture can be
compared with its caption exactly (`zoo.metrics.prompt`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from zoo.data.images import to_tensor
from zoo.data.sampler import Draw, seed_of
from zoo.errors import UserError
from zoo.scene import (
    BACKGROUNDS,
    COLOURS,
    MOST,
    MOTIONS,
    RELATIONS,
    SHADE,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    coverage,
    pattern,
)

EPOCH = 1_000_000  # samples that the sampler takes for one pass over a world without end
_TRIES = 256  # arrangements tried at once; a scene that fits into none is given up
_MARGIN, _GAP = 0.035, 0.045  # free space at the border and between things, shares of the image's side
_CLEAR = 1.35  # how much further apart things are along the axis of their relation than across it
_TRAVEL = 0.3  # way of a moving thing during a clip, share of the image's side


@dataclass(frozen=True)
class Place:
    """Where a thing lies, in shares of the image's side: centre (y points down) and radius."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Sample:
    """One captioned scene.

    Attributes:
        scene: everything that is in the picture.
        caption: what is said of it; open attributes are left out.
        places: one per thing.
    """

    scene: Scene
    caption: str
    places: tuple[Place, ...]


def draw(seed: int, number: int, *, held_out: bool = False, things: int | None = None, motion: bool = False) -> Sample:
    """Sample `number` of the world with this seed.

    Args:
        seed: the world.
        number: the sample.
        held_out: draw from the tenth of captions that training never sees, instead of from the others.
        things: how many, 1 to 3; None = any of them.
        motion: let things move, for clips.
    """
    random = np.random.RandomState(seed_of(seed, "shapes", number) % 2**32)  # its numbers never change
    count = things or random.randint(1, MOST + 1)  # once: crowded scenes are given up more often, not drawn less often
    while True:
        scene = _random_scene(random, count, motion)
        said = _left_open(random, scene)
        places = arrange(scene, random)
        # Both: a full caption must not be learned by way of a shorter one that is not held out.
        if places is not None and said.held_out == scene.held_out == held_out:
            return Sample(scene, str(said), places)


def arrange(scene: Scene, random: np.random.RandomState) -> tuple[Place, ...] | None:
    """Places that fulfil a scene's relations, at the first and at the last moment of a clip; None when none is found.

    Args:
        scene: its sizes that are left open are drawn.
        random: decides everything.
    """
    count = len(scene.things)
    sizes = [SIZES[thing.size or list(SIZES)[random.randint(len(SIZES))]] for thing in scene.things]
    radii = np.array(sizes) * random.uniform(0.94, 1.06, count)
    low = radii + _MARGIN
    centres = low[:, None] + random.uniform(size=(_TRIES, count, 2)) * (1 - 2 * low)[:, None]  # tries things xy
    good = np.ones(_TRIES, bool)
    for moment in (0.0, 1.0):
        now = centres + np.array([_shift(thing, moment) for thing in scene.things])
        good &= ((now >= low[:, None]) & (now <= 1 - low[:, None])).all((1, 2))
        for a in range(count):
            for b in range(a + 1, count):
                apart = np.linalg.norm(now[:, a] - now[:, b], axis=-1)
                good &= apart >= 1.05 * (radii[a] + radii[b]) + _GAP
        for a, relation in enumerate(scene.relations):
            along = 0 if relation in ("left of", "right of") else 1
            distance = (now[:, a + 1] - now[:, a]) * (1 if relation in ("left of", "above") else -1)
            good &= distance[:, along] >= _CLEAR * np.abs(distance[:, 1 - along])
    if not good.any():
        return None
    chosen = centres[int(good.argmax())]
    return tuple(Place(float(x), float(y), float(r)) for (x, y), r in zip(chosen, radii, strict=True))


def render(scene: Scene, places: Sequence[Place], size: int = 64, moment: float = 0.0) -> np.ndarray:
    """Paint a scene.

    Args:
        scene: without open colours and shapes; open textures are solid, an open background is white.
        places: one per thing.
        size: side in pixels.
        moment: of a clip, 0 = its beginning to 1 = its end.

    Returns:
        uint8 (size, size, 3).
    """
    image = np.empty((size, size, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background or "white"]
    for thing, place in zip(scene.things, places, strict=True):
        dx, dy = _shift(thing, moment)
        centre = ((place.x + dx) * size, (place.y + dy) * size)
        covered = coverage(thing.shape or SHAPES[0], centre, place.radius * size, (size, size))[..., None]  # h w 1
        dark = pattern(thing.texture, centre, size, (size, size))[..., None]
        colour = np.array(COLOURS[thing.colour or "red"], np.float32) * (1 - (1 - SHADE) * dark)
        image += covered * (colour - image)
    return np.rint(image).astype(np.uint8)


def clip(scene: Scene, places: Sequence[Place], frames: int, size: int = 64) -> np.ndarray:
    """Paint a scene in motion. uint8 (frames, size, size, 3)."""
    moments = np.linspace(0, 1, frames) if frames > 1 else [0.0]
    return np.stack([render(scene, places, size, float(moment)) for moment in moments])


class Shapes(Dataset):
    """Samples for training: {"image": float32 (3, side, side) in [0, 1], "caption", "scene": str, "number": int}.

    "scene" is the caption that leaves nothing open.

    Args:
        seed: the world.
        held_out: draw captions that training never sees.
        things: how many in each picture, 1 to 3; None = any of them.
        side: of the images, pixels, where no Draw says it.
        render_sizes: sides in pixels at which scenes are painted, one drawn for each sample; a crop shows a part.

    Raises:
        UserError: a number of things that the grammar has not, or a side too small to show a shape.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        held_out: bool = False,
        things: int | None = None,
        side: int = 64,
        render_sizes: Sequence[int] = (),
    ) -> None:
        if things is not None and not 1 <= things <= MOST:
            raise UserError(f"shapes: things must be 1 to {MOST}, got {things}")
        if any(side < 32 for side in render_sizes):
            raise UserError(f"shapes: render_sizes must be at least 32 pixels, got {list(render_sizes)}")
        self.seed, self.held_out, self.things, self.side = seed, held_out, things, side
        self.render_sizes = tuple(render_sizes)

    def __len__(self) -> int:
        """Samples that count as one pass."""
        return EPOCH

    def __getitem__(self, number: int | Draw) -> dict[str, Any]:
        """Sample `number`; a Draw crops to its side and takes its number, so that no sample ever comes twice."""
        side = self.side
        if isinstance(number, Draw):
            number, side = number.number, number.crop
        sample = draw(self.seed, number, held_out=self.held_out, things=self.things)
        sides = [s for s in self.render_sizes if s >= side] or [side]
        random = np.random.RandomState(seed_of(self.seed, "crop", number) % 2**32)
        whole = sides[random.randint(len(sides))]
        top, left = random.randint(0, whole - side + 1, 2)
        image = render(sample.scene, sample.places, whole)[top : top + side, left : left + side]
        return {"image": to_tensor(image), "caption": sample.caption, "scene": str(sample.scene), "number": number}


def _random_scene(random: np.random.RandomState, count: int, motion: bool) -> Scene:
    things = []
    for _ in range(count):
        shape, colour, size, texture = (
            choices[random.randint(len(choices))] for choices in (SHAPES, list(COLOURS), list(SIZES), TEXTURES)
        )
        moving = list(MOTIONS)[random.randint(len(MOTIONS))] if motion and random.uniform() < 0.7 else None
        things.append(Thing(shape, colour, size, texture, moving))
    relations = tuple(RELATIONS[random.randint(len(RELATIONS))] for _ in things[1:])
    return Scene(tuple(things), relations, list(BACKGROUNDS)[random.randint(len(BACKGROUNDS))])


def _left_open(random: np.random.RandomState, scene: Scene) -> Scene:
    """A shorter way to tell a scene: people do not name everything. Only "solid" goes unsaid, not other textures."""
    things = []
    for thing in scene.things:
        size = thing.size if random.uniform() < 0.75 else None
        texture = thing.texture if thing.texture != "solid" or random.uniform() < 0.3 else None
        things.append(Thing(thing.shape, thing.colour, size, texture, thing.motion))
    return Scene(tuple(things), scene.relations, scene.background if random.uniform() < 0.8 else None)


def _shift(thing: Thing, moment: float) -> tuple[float, float]:
    dx, dy = MOTIONS.get(thing.motion or "", (0, 0))
    return dx * _TRAVEL * moment, dy * _TRAVEL * moment
