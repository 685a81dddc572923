import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from zoo.data.blur import filter2d, usm
from zoo.data.crops import Crops, ValidationSet, WholeImages
from zoo.data.images import to_tensor
from zoo.data.jpeg import diffjpeg
from zoo.data.photos import load
from zoo.data.realworld import KINDS, MODES, RealWorld, gaussian_noise, poisson_noise
from zoo.data.sampler import Draw, ResumableLoader
from zoo.data.stages import Stage
from zoo.errors import UserError

PHOTO = to_tensor(load("demo")[0].pixels)[:, :128, 100:236]
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sr_protocol.safetensors")
SHARE = 4.5  # standard deviations that a share of many samples may be off
STILL = {  # settings under which a round changes nothing by chance
    "usm": False,
    "upscale": 1,
    "blur_prob": 0.0,
    "blur_prob2": 0.0,
    "resize_prob": (0.0, 0.0, 1.0),
    "resize_prob2": (0.0, 0.0, 1.0),
    "noise_range": (0.0, 0.0),
    "noise_range2": (0.0, 0.0),
    "gaussian_noise_prob": 1.0,
    "gaussian_noise_prob2": 1.0,
    "jpeg_range": (100.0, 100.0),
    "jpeg_range2": (100.0, 100.0),
    "final_sinc_prob": 0.0,
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def facts_of(step, count=160):
    """What was drawn for many samples; the picture is small, as only choices count."""
    image = PHOTO[:, :88, :88]
    return [step.told(image, generator(seed))[1] for seed in range(count)]


def assert_share(hits, count, expected):
    assert abs(hits - count * expected) <= SHARE * math.sqrt(count * expected * (1 - expected)) + 1e-9, hits / count


def test_the_result_is_a_smaller_image_in_eight_bits():
    for seed in range(4):
        lq = RealWorld()(PHOTO, generator(seed))
        assert lq.shape == (3, 32, 34)
        torch.testing.assert_close(lq * 255, (lq * 255).round(), atol=1e-4, rtol=0)
        assert 0 <= lq.min() <= lq.max() <= 1
    assert RealWorld(upscale=2)(PHOTO[:1, :127, :133], generator()).shape == (1, 63, 66)
    assert RealWorld()(PHOTO.double(), generator()).dtype == torch.float64


def test_settings_that_leave_nothing_to_chance_leave_the_image():
    lq, facts = RealWorld(**STILL).told(PHOTO, generator())
    coded = diffjpeg(diffjpeg(PHOTO[None], 100), 100)[0]
    torch.testing.assert_close(lq, (coded * 255).round() / 255)
    assert [fact.split()[0] for fact in facts if not fact.startswith("to size")] == [
        "x1.00",
        "gaussian",
        "jpeg",
        "x1.00",
        "gaussian",
        "jpeg",
    ]


def test_the_blur_is_that_of_the_reference():
    """With one kernel possible a round is the golden filter, up to what JPEG of quality 100 changes."""
    only = {"kernel_prob": (1, 0, 0, 0, 0, 0), "blur_sigma": (2.1, 2.1), "kernel_size": (15, 15), "sinc_prob": 0.0}
    image = GOLDEN["input.degrade.img"].permute(2, 0, 1).float() / 255
    lq = RealWorld(**STILL | {"blur_prob": 1.0, "resize_range": (0.5, 1.0)} | only)(image, generator())
    blurred = filter2d(image[None], GOLDEN["output.kernel.iso"])
    expected = (diffjpeg(diffjpeg(blurred, 100), 100)[0] * 255).round() / 255
    assert ((lq - expected).abs() <= 1.01 / 255).float().mean() > 0.999  # a coefficient on a tie may flip its block


def test_sharpening_comes_first():
    lq = RealWorld(**STILL | {"usm": True})(PHOTO, generator())
    expected = RealWorld(**STILL)(usm(PHOTO[None])[0], generator())
    assert torch.equal(lq, expected)
    assert not torch.equal(lq, RealWorld(**STILL)(PHOTO, generator()))


def test_kernels_noise_and_order_occur_as_often_as_the_sheet_says():
    """Section 6 of Real-ESRGAN's settings: kinds of blur, sizes, ways and modes of resizing, kinds of noise."""
    facts = facts_of(RealWorld(usm=False))
    count = len(facts)
    first = [said[0] for said in facts]
    kinds = Counter(said.split()[0] for said in first)
    for kind, share in zip(("sinc", *KINDS), (0.1, *(0.9 * p for p in RealWorld().kernel_prob)), strict=True):
        assert_share(kinds[kind], count, share)
    sizes = {int(said.split()[1]) for said in first}
    assert sizes == set(range(7, 22, 2))
    resized = [next(fact for fact in said if fact.startswith("x")) for said in facts]
    factors = [float(fact[1:].split()[0]) for fact in resized]
    assert_share(sum(f > 1 for f in factors), count, 0.2)
    assert_share(sum(f < 1 for f in factors), count, 0.7)
    assert 0.15 <= min(factors) < 0.25
    assert 1.35 < max(factors) <= 1.5
    for mode in MODES:
        assert_share(sum(fact.endswith(mode) for fact in resized), count, 1 / 3)
    noises = [re.findall(r"(gray )?(gaussian|poisson) ([\d.]+)", ", ".join(said)) for said in facts]
    assert all(len(found) == 2 for found in noises)
    for place in (0, 1):
        assert_share(sum(found[place][1] == "gaussian" for found in noises), count, 0.5)
        assert_share(sum(found[place][0] != "" for found in noises), count, 0.4)
    for place, (most_gaussian, most_poisson) in enumerate(((30, 3), (25, 2.5))):
        for kind, most in (("gaussian", most_gaussian), ("poisson", most_poisson)):
            strengths = [float(found[place][2]) for found in noises if found[place][1] == kind]
            assert 0.85 * most < max(strengths) <= most
    assert_share(sum(sum(word[0] in "sigap" for word in said[:1] + said[4:5]) == 2 for said in facts), count, 0.8)
    qualities = [float(fact.split()[1]) for said in facts for fact in said if fact.startswith("jpeg")]
    assert len(qualities) == 2 * count
    assert 30 <= min(qualities) < 32 < 93 < max(qualities) <= 95
    assert_share(sum(said[-1].startswith("jpeg") for said in facts), count, 0.5)
    ends = [[fact for fact in said if not fact.startswith("jpeg")][-1] for said in facts]
    assert_share(sum(fact.startswith("sinc") for fact in ends), count, 0.8)


def test_second_sigmas_and_betas_keep_to_their_ranges():
    step = RealWorld(usm=False, kernel_prob2=(0, 0, 0, 0.5, 0, 0.5), sinc_prob2=0.0, blur_prob2=1.0)
    found = [re.search(r"(generalized|plateau)_aniso \d+ px ([\d.]+) x ([\d.]+) beta ([\d.]+)", ", ".join(said[1:]))
             for said in facts_of(step, 120)]  # fmt: skip
    sigmas = [float(number) for match in found for number in match.group(2, 3)]
    assert 0.2 <= min(sigmas) < 0.27
    assert 1.43 < max(sigmas) <= 1.5
    betas = {kind: [float(m[4]) for m in found if m[1] == kind] for kind in ("generalized", "plateau")}
    assert 0.5 <= min(betas["generalized"]) < 0.65
    assert 3.3 < max(betas["generalized"]) <= 4
    assert_share(sum(beta == 1 for beta in betas["plateau"]), len(betas["plateau"]), 0.5)
    assert max(betas["plateau"]) <= 2


def test_poisson_noise_has_the_variance_of_counted_light():
    image = torch.full((1, 3, 200, 200), 51 / 255)
    image[..., ::2] = 153 / 255  # two levels: two steps of brightness
    noise = poisson_noise(image, 0.7, gray=False, generator=generator())
    for half, brightness in ((noise[..., 1::2], 0.2), (noise[..., ::2], 0.6)):
        assert float(half.mean()) == pytest.approx(0, abs=0.01)
        assert float(half.var()) == pytest.approx(0.49 * brightness / 2, rel=0.03)
    many = (torch.arange(256.0) / 255).expand(1, 3, 64, 256)
    assert float(poisson_noise(many, 1.0, gray=False, generator=generator())[..., 128].var()) == pytest.approx(
        0.5 / 256, rel=0.5
    )
    assert poisson_noise(image, 1.0, gray=True, generator=generator()).shape == (1, 1, 200, 200)
    assert gaussian_noise(image, 5, gray=True, generator=generator()).shape == (1, 1, 200, 200)
    assert float(gaussian_noise(image, 5, gray=False, generator=generator()).std()) == pytest.approx(5 / 255, rel=0.01)


@pytest.fixture
def crops():
    return Crops("demo", 4, [RealWorld(context=12)], seed=3)


def test_a_sample_follows_from_its_number_on_any_number_of_workers_and_threads(crops):
    stage = [Stage(batch_size=2, patch_size=12)]
    batches = []
    for workers in (0, 2):
        loader = ResumableLoader(crops, stage, 3, epoch_steps=2, workers=workers)
        batches.append([batch["lq"] for batch in loader])
        loader._iterator = None
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(crops[Draw(1, 0, 12)]["lq"], batches[0][0][1])
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(batches[0][0][0], batches[0][0][1])
    assert batches[0][0].shape == (2, 3, 12, 12)


def test_lq_lies_where_gt_lies():
    """Without noise and blur the small picture is the target shrunk, wherever the crop was cut out of its context."""
    step = RealWorld(**STILL | {"upscale": 4, "context": 12, "resize_modes": ("area",)})
    crops = Crops("demo", 4, [step], seed=3)
    for number in range(4):
        sample = crops[Draw(number, 0, 12)]
        assert sample["gt"].shape == (3, 48, 48)
        assert (F.avg_pool2d(sample["gt"], 4) - sample["lq"]).abs().mean() < 0.02


def test_validation_degrades_whole_images_the_same_way_every_time():
    spec = ValidationSet("demo", [RealWorld()])
    once, again = (WholeImages("real", spec, 4)[0] for _ in range(2))
    assert torch.equal(once["lq"], again["lq"])
    assert once["lq"].shape[-1] * 4 == once["gt"].shape[-1]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"upscale": 0}, "upscale must be at least 1"),
        ({"kernel_size": (7, 20)}, r"kernel_size must be two odd numbers, got \(7, 20\)"),
        ({"kernel_prob2": (0, 0, 0, 0, 0, 0)}, "kernel_prob2 must be shares"),
        ({"resize_range": (1.5, 0.15)}, r"resize_range must lie in 0\.01 to 16, the smaller end first"),
        ({"jpeg_range2": (0.0, 95.0)}, "jpeg_range2 must lie in 1 to 100"),
        ({"final_sinc_prob": 1.2}, r"final_sinc_prob must lie in 0 to 1, got 1\.2"),
        ({"resize_modes": ("lanczos",)}, "resize_modes must be some of area, bilinear, bicubic"),
        ({"final_sinc_cutoff": (1.0, 4.0)}, "final_sinc_cutoff must lie in 0.001 to"),
    ],
)
def test_impossible_settings_are_one_sentence(settings, said):
    with pytest.raises(UserError, match=f"RealWorld: {said}"):
        replace(RealWorld(), **settings)


def test_images_that_shrink_below_the_kernels_are_named():
    with pytest.raises(UserError, match="an image of 60x60 shrinks to less than half of the 21-pixel kernels; enlarge"):
        RealWorld(usm=False)(torch.zeros(3, 60, 60), generator())
