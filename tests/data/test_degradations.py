from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zoo.data.degradations import Bicubic, Degradation, Jpeg, Noise, add_noise, augment, imresize
from zoo.data.jpeg import diffjpeg, jpeg
from zoo.errors import UserError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sr_protocol.safetensors")
IMAGE = GOLDEN["input.degrade.img"].permute(2, 0, 1).float() / 255


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("hflip", [0, 1])
@pytest.mark.parametrize("vflip", [0, 1])
@pytest.mark.parametrize("transpose", [0, 1])
def test_augmentation_equals_the_reference(hflip, vflip, transpose):
    image = GOLDEN["input.degrade.img"][:6, :8].permute(2, 0, 1)
    expected = GOLDEN[f"output.augment.h{hflip}v{vflip}t{transpose}"].permute(2, 0, 1)
    torch.testing.assert_close(augment(image, hflip, vflip, transpose), expected)


def test_benchmark_noise_is_numpys_legacy_stream_in_bgr_order():
    noisy = add_noise(IMAGE.double(), 25)
    np.random.seed(0)
    bgr = IMAGE.double().numpy()[::-1].transpose(1, 2, 0)
    expected = bgr + np.random.normal(0, 25 / 255, bgr.shape)
    np.testing.assert_allclose(noisy.numpy(), expected.transpose(2, 0, 1)[::-1], atol=1e-12)
    torch.testing.assert_close(Noise(25).fixed(IMAGE), add_noise(IMAGE, 25))
    assert noisy.max() > 1  # not clipped


def test_bicubic_cuts_resizes_and_rounds():
    lq = Bicubic(3)(IMAGE, generator())
    assert lq.shape == (3, 16, 18)
    expected = (imresize(IMAGE[..., :54].double(), 1 / 3).clamp(0, 1) * 255).round()
    torch.testing.assert_close((lq * 255).double(), expected, atol=1e-4, rtol=0)


def test_steps_are_functions_of_their_generator():
    for step in (Jpeg((5, 95)), Noise((0, 50)), Jpeg((5, 95), probability=0.5)):
        results = [step(IMAGE, generator(seed)) for seed in (0, 1, 2, 0)]
        torch.testing.assert_close(results[0], results[3], atol=0, rtol=0)
        assert any(not torch.equal(results[0], other) for other in results[1:3]), step


def test_strength_covers_its_range():
    flat = torch.full((1, 64, 64), 0.5)
    sigmas = [float(Noise((10, 20))(flat, generator(i)).std()) * 255 for i in range(200)]
    assert 9 < min(sigmas) < 11.5 < 18.5 < max(sigmas) < 21
    possible = [jpeg(IMAGE, q) for q in (10, 11)]
    seen = [[torch.equal(Jpeg((10, 11))(IMAGE, generator(i)), p) for p in possible] for i in range(30)]
    assert {tuple(hit) for hit in seen} == {(True, False), (False, True)}  # both ends, nothing else


def test_probability_is_a_share_of_the_samples():
    hit = sum(not torch.equal(Noise(25, probability=0.3)(IMAGE, generator(i)), IMAGE) for i in range(200))
    assert 35 < hit < 85
    assert torch.equal(Jpeg(10, probability=0)(IMAGE, generator()), IMAGE)


def test_what_was_drawn_is_told():
    assert Bicubic(3).told(IMAGE, generator())[1] == ["bicubic 1/3"]
    coded, facts = Jpeg((10, 90)).told(IMAGE, generator(3))
    torch.testing.assert_close(coded, jpeg(IMAGE, int(facts[0].removeprefix("jpeg "))))
    noisy, (fact,) = Noise((10, 50)).told(torch.zeros(1, 128, 128), generator(3))
    assert float(noisy.std()) * 255 == pytest.approx(float(fact.removeprefix("noise ")), rel=0.03)
    assert Noise(25, probability=0).told(IMAGE, generator())[1] == []


def test_a_simulated_jpeg_is_the_differentiable_one_in_eight_bits():
    expected = (diffjpeg(IMAGE[None], 20.0)[0] * 255).round() / 255
    assert torch.equal(Jpeg(20, simulated=True).fixed(IMAGE), expected)
    assert not torch.equal(expected, jpeg(IMAGE, 20))
    gray = IMAGE[:1]
    imitated, real = Jpeg(20, simulated=True).fixed(gray), jpeg(gray, 20)
    assert (imitated - real).abs().mean() < 0.8 * (gray - real).abs().mean()


class Brighter(Degradation):
    def told(self, lq, generator):
        return lq + torch.rand((), generator=generator), []


def test_without_a_protocol_the_name_of_the_image_decides():
    once, again, other = (Brighter().fixed(IMAGE, name) for name in ("a", "a", "b"))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(Noise(25).fixed(IMAGE, "a"), Noise(25).fixed(IMAGE, "b")), "the protocol knows one noise"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jpeg(0), "Jpeg: quality must lie in 1 to 100.*got 0"),
        (lambda: Jpeg((90, 60)), "smaller end first"),
        (lambda: Jpeg((1, 2, 3)), "must be a number or a pair"),
        (lambda: Noise(-1), "Noise: sigma"),
        (lambda: Noise(5, probability=2), "probability must lie in 0 to 1, got 2"),
        (lambda: Bicubic(0), "upscale must be a whole number of at least 1"),
        (lambda: Jpeg((10, 20)).fixed(IMAGE), "one number with probability 1 for validation"),
        (lambda: Noise(15, probability=0.5).fixed(IMAGE), "one number with probability 1 for validation"),
    ],
)
def test_impossible_steps_are_one_sentence(make, message):
    with pytest.raises(UserError, match=message):
        make()
