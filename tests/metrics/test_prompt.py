"""The judge of shapes world: right about real pictures, and not to be fooled by wrong ones."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from zoo.data.images import to_array, to_tensor
from zoo.data.shapes import draw, render
from zoo.errors import UserError
from zoo.metrics.prompt import adherence, find, judge
from zoo.pipelines.parts import build_parts, to_latents, to_pixels
from zoo.scene import Scene, Thing, parse

COUNT = 100


@pytest.fixture(scope="module")
def world():
    samples = [draw(5, number) for number in range(COUNT)]
    return [(render(sample.scene, sample.places), sample) for sample in samples]


def test_real_images_are_right(world):
    shares = adherence((image, sample.scene) for image, sample in world)
    assert shares["all"] >= 0.99
    assert min(shares.values()) >= 0.99


def test_real_images_of_another_size_are_right():
    samples = [draw(6, number) for number in range(20)]
    for side in (48, 128):
        shares = adherence((render(sample.scene, sample.places, side), sample.scene) for sample in samples)
        assert shares["all"] >= 0.95


def test_shuffled_prompts_are_wrong(world):
    captions = [parse(sample.caption) for _, sample in world]
    shares = adherence((image, other) for (image, _), other in zip(world, captions[1:] + captions[:1], strict=True))
    assert shares["all"] <= 0.05


def test_noise_is_wrong(world):
    random = np.random.RandomState(0)
    noise = ((random.randint(0, 256, (64, 64, 3)).astype(np.uint8), sample.scene) for _, sample in world)
    assert adherence(noise)["all"] == 0


def test_blur_is_wrong(world):
    blurred = ((np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(6))), s.scene) for image, s in world)
    assert adherence(blurred)["all"] == 0


WRONG = {
    "count": Scene((Thing("circle", "red"), Thing("star", "blue")), ("left of",)),
    "colour": Scene((Thing("circle", "pink", "large", "striped"),), background="white"),
    "shape": Scene((Thing("square", "red", "large", "striped"),), background="white"),
    "size": Scene((Thing("circle", "red", "small", "striped"),), background="white"),
    "texture": Scene((Thing("circle", "red", "large", "dotted"),), background="white"),
    "background": Scene((Thing("circle", "red", "large", "striped"),), background="black"),
}


@pytest.mark.parametrize("attribute", WRONG)
def test_one_wrong_attribute_is_found(attribute):
    sample = draw(0, 1, things=1)
    scene = Scene((Thing("circle", "red", "large", "striped"),), background="white")
    image = render(scene, [type(sample.places[0])(0.5, 0.45, 0.2)])
    assert judge(image, scene).all
    assert judge(image, scene).texture
    verdict = judge(image, WRONG[attribute])
    assert not getattr(verdict, attribute)
    assert verdict.all == (attribute in ("texture", "background"))


def test_relations_are_told_apart():
    places = [type(draw(0, 1).places[0])(x, y, 0.13) for x, y in ((0.25, 0.3), (0.7, 0.4))]
    scene = Scene((Thing("circle", "red"), Thing("circle", "red")), ("left of",))
    image = render(scene, places)
    assert judge(image, scene).relation
    # Two equal things can be told in either order, but not as lying above each other.
    assert not judge(image, Scene(scene.things, ("above",))).relation
    different = Scene((Thing("circle", "red"), Thing("star", "blue")), ("left of",))
    image = render(different, places)
    assert judge(image, different).all
    assert not judge(image, Scene(different.things, ("right of",))).relation


def test_what_a_caption_leaves_open_is_right(world):
    image, _ = world[0]
    things = len(find(image)[0])
    assert judge(image, Scene(tuple(Thing() for _ in range(things)))).count


def test_found_things_tell_place_and_size(world):
    image, sample = next((i, s) for i, s in world if len(s.scene.things) == 1)
    (thing,), background = find(image)
    place = sample.places[0]
    assert thing.centre == pytest.approx((place.x * 64, place.y * 64), abs=0.6)
    assert thing.radius == pytest.approx(place.radius * 64, rel=0.06)
    assert background == (sample.scene.background or "white")


def test_an_empty_picture_holds_nothing():
    assert find(np.full((64, 64, 3), 250, np.uint8)) == ([], "white")


def test_bad_images_are_refused():
    for shape in ((64, 64), (8, 8, 3), (64, 64, 4)):
        with pytest.raises(UserError, match="RGB images of at least 32"):
            find(np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match="no pictures"):
        adherence([])


def test_the_shipped_autoencoder_keeps_what_captions_say():
    vae = build_parts({"vae": "shapes-sd"})["vae"]
    samples = [draw(15, number) for number in range(120)]
    images = torch.stack([to_tensor(render(sample.scene, sample.places)) for sample in samples])
    with torch.no_grad():
        back = torch.cat([to_pixels(vae, to_latents(vae, some)) for some in images.split(24)])
    shares = adherence((to_array(image), s.scene) for image, s in zip(back, samples, strict=True))
    assert shares["all"] >= 0.95
    assert shares["count"] == shares["colour"] == 1
