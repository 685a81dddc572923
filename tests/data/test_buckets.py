import numpy as np
import pytest
from PIL import Image

from zoo.data.buckets import Buckets, assign, bucket_sizes, cover
from zoo.data.captions import CaptionedFolder
from zoo.data.sampler import Draw
from zoo.data.stages import Stage
from zoo.errors import UserError


def folder(path, *sizes):
    for number, (h, w) in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (h, w, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{number:03d}.png")
        (path / f"{number:03d}.txt").write_text(f"left of {number}\nright of {number}")
    return CaptionedFolder(path)


@pytest.mark.parametrize(("side", "multiple"), [(64, 8), (512, 64), (1024, 16), (96, 32), (8, 8)])
@pytest.mark.parametrize("aspect", [1, 1.5, 2])
def test_buckets_keep_area_multiple_and_aspect(side, multiple, aspect):
    sizes = bucket_sizes(side, multiple, aspect)
    assert sizes[0] == (side, side)
    assert len(set(sizes)) == len(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0
        assert side * side - multiple * max(h, w) < h * w <= side * side
        assert max(h, w) <= aspect * min(h, w)
        assert (w, h) in sizes
    assert aspect > 1 or sizes == ((side, side),)


def test_known_buckets():
    assert bucket_sizes(64, 8) == ((64, 64), (56, 72), (72, 56), (48, 80), (80, 48))


def test_images_go_to_the_nearest_ratio_and_lonely_ones_join_the_crowd():
    buckets = bucket_sizes(64, 8)
    sizes = [(100, 100), (101, 100), (480, 800), (8, 9), (3000, 400), (90, 100)]
    chosen, moved = assign(sizes, buckets)
    assert [buckets[n] for n in chosen] == [(64, 64), (64, 64), (48, 80), (64, 64), (80, 48), (64, 64)]
    assert moved == 0
    chosen, moved = assign([(64, 64)] * 5 + [(48, 80)] * 3 + [(56, 72), (80, 48)], buckets, fewest=3)
    assert [buckets[n] for n in chosen] == [(64, 64)] * 5 + [(48, 80)] * 3 + [(64, 64)] * 2
    assert moved == 2
    chosen, moved = assign([(64, 64), (64, 64), (40, 80)], buckets, fewest=50)
    assert {buckets[n] for n in chosen} == {(64, 64)}
    assert moved == 1


@pytest.mark.parametrize(
    ("size", "into"), [((40, 60), (40, 60)), ((200, 100), (64, 64)), ((33, 77), (64, 64)), ((9, 9), (48, 80))]
)
def test_the_middle_is_shown_unstretched(size, into):
    y, x = np.mgrid[: size[0], : size[1]]
    ramp = np.stack([255 * y / (size[0] - 1), 255 * x / (size[1] - 1), 0 * x], axis=2).astype(np.uint8)
    shown = cover(ramp, into).astype(float)
    assert shown.shape == (*into, 3)
    if size == into:
        np.testing.assert_array_equal(shown, ramp)
    means = shown[2:-2, 2:-2, :2].mean((0, 1))
    np.testing.assert_allclose(means, 127, atol=1.5)  # centred
    slopes = [
        np.diff(shown[..., 0], axis=0)[4:-4].mean() * size[0],
        np.diff(shown[..., 1], axis=1)[:, 4:-4].mean() * size[1],
    ]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.08)  # the same scale up and across; 8 bits and ringing blur it


def test_shrinking_is_antialiased():
    stripes = np.repeat((np.arange(256) % 2 * 255).astype(np.uint8)[None, :, None], 3, axis=2).repeat(256, axis=0)
    assert np.ptp(cover(stripes, (64, 64))[:, 4:-4].astype(int)) <= 2


def test_samples_are_functions_of_their_draw(tmp_path):
    images = folder(tmp_path, (100, 100), (70, 110), (110, 70))
    data = Buckets(images, [0, 1, 2], [Stage(2, 1, 64), Stage(None, 1, 32)])
    assert data.sizes(64) == [(64, 64), (48, 80), (80, 48)]
    assert data.groups(Stage(2, 1, 64)) == [0, 3, 4]
    sample = data[Draw(17, 1, 64)]
    assert sample["image"].shape == (3, 48, 80)
    assert sample["number"] == 17
    assert sample["caption"] in ("left of 1", "right of 1")
    assert data[Draw(17, 1, 32)]["image"].shape == (3, *data.sizes(32)[1])
    assert data[2]["image"].shape == (3, *data.sizes(32)[2])
    drawn = {data[Draw(number, 1, 64)]["caption"] for number in range(20)}
    assert drawn == {"left of 1", "right of 1"}
    assert all((data[Draw(n, 1, 64)]["image"] == sample["image"]).all() for n in range(8))  # no flips unless asked
    flipping = Buckets(images, [0, 1, 2], [Stage(None, 1, 64)], hflip=True)
    seen = [flipping[Draw(n, 1, 64)]["image"] for n in range(20)]
    mirrored = sum(bool((image == sample["image"].flip(2)).all()) for image in seen)
    same = sum(bool((image == sample["image"]).all()) for image in seen)
    assert mirrored + same == 20
    assert mirrored > 3 < same


def test_damage_found_later_never_brings_an_image_of_others(tmp_path):
    images = folder(tmp_path, (64, 64), (64, 64), (40, 80), (64, 64))
    images._kept = {}
    for number in (0, 1):
        images.path(number).write_bytes(b"gone")
    data = Buckets(images, [0, 2], [Stage(None, 1, 64)])
    found = data[Draw(5, 0, 64)]
    assert found["image"].shape == (3, 64, 64)  # what the batch needs
    assert found["caption"].endswith("2")
    images.path(2).write_bytes(b"gone")
    images._unreadable.clear()
    with pytest.raises(UserError, match="none of its images can be read any more"):
        data[0]


def test_the_report_counts_buckets_moves_and_enlargements(tmp_path):
    sizes = [(100, 100)] * 4 + [(40, 40)] + [(100, 170)] * 4 + [(170, 100)]
    data = Buckets(folder(tmp_path, *sizes), range(10), [Stage(None, 4, 64)])
    report = str(data.report())
    assert "buckets of patch_size 64: 64x64 (6), 80x48 (4)" in report
    assert "1 images are cut to a more common shape" in report
    assert "1 images are enlarged for patch_size 64" in report


def test_impossible_requests_are_one_sentence():
    for side, multiple, aspect in ((100, 8, 2), (64, 0, 2), (64, 8, 0.5), (64, 8, float("nan"))):
        with pytest.raises(UserError, match="patch_size must be a multiple of `multiple` and aspect at least 1"):
            bucket_sizes(side, multiple, aspect)
