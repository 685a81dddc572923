import math

import pytest
import torch
from torch.nn import functional as F

from zoo.data.crops import Crops, ValidationSet, WholeImages
from zoo.data.images import to_tensor
from zoo.data.photos import load
from zoo.data.sampler import Draw
from zoo.data.weather import Rain, Raindrops, Snow, Weather
from zoo.errors import UserError

KINDS = [Rain, Snow, Raindrops]
PHOTO = to_tensor(load("demo")[0].pixels)[:, 90:218, 150:278]
NEAR = 0.02  # dB; rounding to 8 bits moves a squared error of 1/400 by no more


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def psnr(lq, clean):
    return -10 * math.log10(float((lq.double() - clean.double()).square().mean()))


@pytest.mark.parametrize("kind", KINDS)
def test_severity_is_the_stated_psnr(kind):
    reached = [psnr(kind((20, 26))(PHOTO, generator(seed)), PHOTO) for seed in range(12)]
    assert 20 - NEAR < min(reached) < 22
    assert 24 < max(reached) < 26 + NEAR
    for seed in range(3):
        lq, facts = kind(22.5).told(PHOTO, generator(seed))
        assert psnr(lq, PHOTO) == pytest.approx(22.5, abs=NEAR)
        assert facts[0] == f"{kind.__name__.lower()} 22.5 dB"
        assert lq.shape == PHOTO.shape
        assert 0 <= lq.min() <= lq.max() <= 1
        torch.testing.assert_close(lq * 255, (lq * 255).round(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_blank_photos_of_any_size_come_to_it_too(kind, level):
    for size in ((3, 64, 64), (1, 40, 72), (3, 8, 8), (3, 1, 1)):
        blank = torch.full(size, level)
        found = psnr(kind(21.0)(blank, generator(1)), blank)
        # Where a veil makes up for weather, rounding may move all pixels the same way, by half of 1/255.
        assert found == pytest.approx(21.0, abs=0.2), size


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_follows_from_its_seed(kind):
    first, same, other = (kind()(PHOTO, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert kind()(PHOTO.double(), generator(5)).dtype == torch.float64


def test_rain_leaves_streaks_along_its_direction():
    """On black, the second moments of the brightness differences say where streaks point."""
    black = torch.zeros(3, 160, 160)
    for angle in (-30.0, 0.0, 30.0):
        lq = Rain(22.0, angle=(angle, angle), veil=(0.0, 0.0))(black, generator(2))[:1]
        lq = F.avg_pool2d(lq, 5, 1)[0]  # steps between pixels tell directions of thin lines badly
        dy, dx = (lq.diff(dim=axis)[:-1, :] if axis else lq.diff(dim=axis)[:, :-1] for axis in (0, 1))
        a, b, c = float((dx * dx).mean()), float((dx * dy).mean()), float((dy * dy).mean())
        across = 0.5 * math.degrees(math.atan2(2 * b, a - c))  # of the strongest change, from x towards y
        assert across == pytest.approx(-angle, abs=4), "streaks of positive angle fall towards the right"


def test_longer_streaks_and_larger_flakes_are_so():
    black = torch.zeros(3, 160, 160)
    for short, long in (
        (Rain(22.0, angle=(0, 0), length=(5, 6), veil=(0, 0)), Rain(22.0, angle=(0, 0), length=(28, 30), veil=(0, 0))),
        (Snow(22.0, size=(0.8, 0.8), veil=(0, 0)), Snow(22.0, size=(3, 3), veil=(0, 0))),
        (Raindrops(24.0, size=(3, 3.1)), Raindrops(24.0, size=(15, 16))),
    ):
        scene = PHOTO if isinstance(short, Raindrops) else black
        change = [(step(scene, generator(4)) - scene).abs().sum(0) for step in (short, long)]
        # Correlation of the change with itself four rows below.
        kept = [float((x[4:] * x[:-4]).mean() / x.square().mean()) for x in change]
        assert kept[1] > kept[0] + 0.1, short


def test_haze_takes_its_share_of_the_error():
    black = torch.zeros(3, 160, 160)
    for kind in (Rain, Snow):
        clear, hazy = (kind(22.0, veil=(veil, veil))(black, generator(3)) for veil in (0.0, 0.8))
        assert float(clear.median()) == 0
        assert float(hazy.median()) > 0.04, kind


def test_drops_show_the_scene_upside_down():
    """The scene gets brighter downwards, most of what drops show darker; their rims are dark all around."""
    scene = torch.linspace(0.2, 0.8, 128)[None, :, None].expand(3, 128, 128).contiguous()
    falls = []
    for seed in range(6):
        lq = Raindrops(26.0)(scene, generator(seed))[0]
        inside = (lq - scene[0]).abs()[1:] > 0.03
        falls.append(lq.diff(dim=0)[inside] < 0)
    assert torch.cat(falls).float().mean() > 0.55
    assert float((Raindrops(26.0)(PHOTO, generator(0)) != PHOTO).float().mean()) < 0.5, (
        "the pane between drops is clear"
    )


def test_shares_decide_which_weather_it_is():
    said = [Weather(rain=2.0, snow=1.0, raindrops=1.0).told(PHOTO[:, :32, :32], generator(i))[1][0] for i in range(80)]
    counts = [sum(fact.startswith(f"{kind} ") for fact in said) for kind in ("rain", "snow", "raindrops")]
    assert sum(counts) == 80
    assert 28 <= counts[0] <= 52
    assert min(counts[1:]) >= 10
    only = Weather(24.0, rain=0, raindrops=0).told(PHOTO, generator(7))
    assert only[1][0] == "snow 24.0 dB"


def test_no_weather_at_all_where_the_probability_says_so():
    for step in (Rain(probability=0), Weather(probability=0)):
        lq, facts = step.told(PHOTO, generator())
        assert torch.equal(lq, PHOTO)
        assert facts == []


def test_samples_and_validation_images_are_the_same_every_time():
    crops = [Crops("demo", 1, [Weather()], seed=2) for _ in range(2)]
    first, again = (c[Draw(9, 0, 48)] for c in crops)
    assert torch.equal(first["lq"], again["lq"])
    assert 20 - NEAR < psnr(first["lq"], first["gt"]) < 26 + NEAR
    whole = [WholeImages("rain", ValidationSet("demo", [Rain()]), 1)[0] for _ in range(2)]
    assert torch.equal(whole[0]["lq"], whole[1]["lq"])
    assert 20 - NEAR < psnr(whole[0]["lq"], whole[0]["gt"]) < 26 + NEAR
    other = Rain().fixed(whole[0]["gt"][0], "another name")
    assert not torch.equal(other, whole[0]["lq"][0])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Rain((26, 20)), "Rain: psnr must lie in 10 to 50, the smaller end first"),
        (lambda: Snow(5), "Snow: psnr must lie in 10 to 50"),
        (lambda: Snow(size=(0, 2)), "Snow: size must lie in 0.3 to 100"),
        (lambda: Rain(angle=(-100, 0)), "Rain: angle"),
        (lambda: Rain(veil=(0, 1)), "Rain: veil must lie in 0 to 0.9"),
        (lambda: Raindrops(size=(0.5, 4)), "Raindrops: size"),
        (lambda: Raindrops(probability=2), "Raindrops: probability must lie in 0 to 1, got 2"),
        (lambda: Weather(rain=0, snow=0, raindrops=0), "Weather: rain, snow and raindrops must be shares, not all 0"),
        (lambda: Weather((26, 20)), "psnr must lie in 10 to 50"),
    ],
)
def test_impossible_settings_are_one_sentence(make, said):
    with pytest.raises(UserError, match=said):
        make()
