"""The grammar of shapes world and the outlines of its shapes."""

import re

import numpy as np
import pytest

from zoo.data.shapes import draw
from zoo.errors import UserError
from zoo.scene import RELATIONS, SHAPES, WORDS, Scene, Thing, coverage, holds, parse, pattern, unknown_words


@pytest.mark.parametrize("number", range(60))
def test_every_caption_is_read_back_as_it_was_meant(number):
    sample = draw(3, number, motion=number % 2 == 0)
    assert str(parse(sample.caption)) == sample.caption
    assert str(parse(str(sample.scene))) == str(sample.scene)
    assert set(sample.caption.split()) <= set(WORDS)


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("RED CIRCLE", "a red circle"),
        ("A red circle, to the left of an orange square.", "a red circle left of an orange square"),
        ("blue large ring on a grey background", "a large blue ring on a gray background"),
        ("a star moving up under a cross", "a star moving up below a cross"),
        ("circle", "a circle"),
        ("a red circle , left of a blue/dotted star - .", "a red circle left of a dotted blue star"),
    ],
)
def test_free_wording_is_understood(text, caption):
    assert str(parse(text)) == caption


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red zebra", "does not know zebra"),
        ("a red", "needs a shape"),
        ("", "needs a shape"),
        ("a red blue circle", "'blue' cannot stand"),
        ("a red circle left of", "needs a shape"),
        ("a circle on a red background", "'on a white background'"),
        ("a circle above a circle above a circle above a circle", "at most 3 things, got 4"),
        ("x" * 5000, "..."),
    ],
)
def test_what_is_no_caption_is_refused_in_one_sentence(text, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        parse(text)
    assert len(str(caught.value)) < 200


def test_unknown_words_are_named_once():
    assert unknown_words("a red Zebra, 😀 and 3 zebra!") == ["zebra,", "😀", "3", "zebra!"]
    assert unknown_words("A large, striped RED circle.") == []


def test_both_ways_of_telling_a_scene_are_held_out_together():
    scenes = [draw(0, n, things=2).scene for n in range(40)] + [draw(0, n, held_out=True).scene for n in range(10)]
    assert all(scene.held_out == scene.mirrored().held_out for scene in scenes)
    assert all(str(scene.mirrored().mirrored()) == str(scene) for scene in scenes)


def test_about_a_tenth_of_captions_is_held_out():
    scenes = [Scene((Thing(s, c, z),)) for s in SHAPES for c in ("red", "blue") for z in ("small", "large", None)]
    scenes += [
        Scene((Thing(s), Thing(t, c)), (r,)) for s in SHAPES for t in SHAPES for r in RELATIONS for c in ("red", "pink")
    ]
    share = np.mean([scene.held_out for scene in scenes])
    assert 0.05 < share < 0.16


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_holds_one_way_only(relation):
    places = [(10.0, 10.0), (40.0, 14.0), (12.0, 50.0)]
    pairs = [(a, b) for a in places for b in places if a != b]
    assert any(holds(relation, a, b) for a, b in pairs)
    assert not any(holds(relation, a, b) and holds(relation, b, a) for a, b in pairs)


AREAS = {  # of radius 1, by the formula of each outline
    "circle": np.pi,
    "square": 1.7**2,
    "triangle": 0.5 * 1.96 * 1.75,
    "star": 5 * 1.08 * 0.48 * np.sin(np.pi / 5),
    "cross": 4 * 0.32 * (2 * 0.97 - 0.32),
    "ring": np.pi * 0.75,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area_wherever_it_lies(shape):
    for centre in ((30.0, 30.0), (31.3, 28.6)):
        drawn = coverage(shape, centre, 20.0, (60, 64))
        assert drawn.shape == (60, 64)
        assert drawn.min() == 0
        assert drawn.max() == 1
        assert abs(drawn.sum() / 400 - AREAS[shape]) < 0.01 * AREAS[shape]


def test_a_shape_at_the_border_is_cut_off():
    assert coverage("circle", (0.0, 0.0), 10.0, (32, 32)).sum() == pytest.approx(25 * np.pi, rel=0.01)
    assert coverage("circle", (-50.0, 0.0), 10.0, (32, 32)).sum() == 0


@pytest.mark.parametrize("texture", ["striped", "dotted"])
def test_a_texture_is_dark_in_part_and_moves_with_its_thing(texture):
    here, there = (pattern(texture, centre, 64, (64, 64)) for centre in ((20.0, 20.0), (25.0, 22.0)))
    assert 0.2 < here.mean() < 0.6
    assert np.allclose(here[10:40, 10:40], there[12:42, 15:45])
    assert pattern(None, (0, 0), 64, (8, 8)).sum() == 0
