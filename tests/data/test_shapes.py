"""Shapes world: the same everywhere, true to its captions, never one of the held-out ones in training."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from zoo.data.sampler import Draw
from zoo.data.shapes import Shapes, clip, draw, render
from zoo.errors import UserError
from zoo.scene import BACKGROUNDS, COLOURS, Scene, Thing, holds

PINNED = [
    "a medium striped blue square right of a small striped green ring below an orange circle on a gray background",
    "a small striped green cross right of a dotted green square left of a medium pink ring",
]
PINNED_SUM = 1541376


def test_a_sample_is_a_function_of_seed_and_number():
    first, again = Shapes(7)[123], Shapes(7)[123]
    assert first["caption"] == again["caption"]
    assert (first["image"] == again["image"]).all()
    assert first["image"].shape == (3, 64, 64)
    assert Shapes(8)[123]["caption"] != first["caption"] or (Shapes(8)[123]["image"] != first["image"]).any()


def test_the_world_never_changes():
    """Pinned: shipped weights and their scores belong to these samples."""
    assert [draw(0, n).caption for n in range(2)] == PINNED
    assert int(render(draw(0, 0).scene, draw(0, 0).places).astype(int).sum()) == PINNED_SUM


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_the_samples(workers):
    alone, shared = (
        [caption for batch in DataLoader(list_of(24), batch_size=4, num_workers=n) for caption in batch["caption"]]
        for n in (0, workers)
    )
    assert alone == shared


def list_of(count):
    """The first samples, as a data set with an end."""
    world = Shapes(5)
    return _First(world, count)


class _First:
    def __init__(self, world, count):
        self.world, self.count = world, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.world[index]


@pytest.mark.parametrize("number", range(40))
def test_things_lie_as_the_caption_says_apart_and_inside(number):
    sample = draw(2, number)
    for i, relation in enumerate(sample.scene.relations):
        a, b = sample.places[i], sample.places[i + 1]
        assert holds(relation, (a.x, a.y), (b.x, b.y))
    for i, a in enumerate(sample.places):
        assert min(a.x, a.y, 1 - a.x, 1 - a.y) > a.radius
        assert all(np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius for b in sample.places[i + 1 :])


def test_held_out_captions_and_training_captions_never_meet():
    train = [draw(0, n) for n in range(300)]
    unseen = [draw(0, n, held_out=True) for n in range(30)]
    assert not any(s.scene.held_out or parse_held_out(s.caption) for s in train)
    assert all(s.scene.held_out and parse_held_out(s.caption) for s in unseen)


def parse_held_out(caption):
    from zoo.scene import parse

    return parse(caption).held_out


def test_one_two_and_three_things_come_about_equally_often():
    counts = np.bincount([len(draw(1, n).scene.things) for n in range(300)])[1:]
    assert counts.min() > 70


def test_colours_and_background_are_those_of_the_palette():
    sample = draw(0, 5, things=1)
    scene = Scene((Thing("square", "green", "large"),), background="beige")
    image = render(scene, sample.places[:1], 96)
    place = sample.places[0]
    assert tuple(image[int(place.y * 96), int(place.x * 96)]) == COLOURS["green"]
    assert tuple(image[0, 0]) == BACKGROUNDS["beige"]


def test_a_larger_picture_shows_the_same_scene():
    sample = draw(0, 8)
    small, large = (render(sample.scene, sample.places, side).astype(float) for side in (64, 128))
    shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(small - shrunk).mean() < 3  # of 255: only antialiasing differs


def test_crops_show_a_part_and_their_number_decides():
    world = Shapes(0, render_sizes=[128])
    crop = world[Draw(11, 999, 64)]
    assert crop["image"].shape == (3, 64, 64)
    assert crop["number"] == 11
    assert crop["caption"] == world[11]["caption"]


def test_a_clip_moves_what_moves():
    scene = Scene((Thing("circle", "red", "small", None, "moving right"), Thing("square", "blue", "small")), ("above",))
    from zoo.data.shapes import arrange

    places = arrange(scene, np.random.RandomState(0))
    assert places is not None
    frames = clip(scene, places, 5).astype(int)
    assert frames.shape == (5, 64, 64, 3)
    red = [np.nonzero((f[..., 0] > 180) & (f[..., 1] < 100))[1].mean() for f in frames]
    blue = [np.nonzero((f[..., 2] > 180) & (f[..., 0] < 100))[1].mean() for f in frames]
    assert np.diff(red) == pytest.approx([0.3 * 64 / 4] * 4, abs=0.3)
    assert np.ptp(blue) == 0
    assert (frames[0] == render(scene, places)).all()


def test_a_scene_that_fits_nowhere_is_given_up():
    from zoo.data.shapes import arrange

    crowded = Scene(tuple(Thing("circle", "red", "large") for _ in range(3)), ("left of", "left of"))
    assert arrange(crowded, np.random.RandomState(0)) is None


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="things must be 1 to 3, got 4"):
        Shapes(things=4)
    with pytest.raises(UserError, match="at least 32 pixels"):
        Shapes(render_sizes=[8])
