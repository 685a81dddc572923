import pytest
import torch

from tests.helpers import error
from zoo.errors import UserError
from zoo.tasks.objectives import FFT, L1, Charbonnier, Wavelet

EXACT = 1e-6  # relative, float32 sums over a few thousand values
ALL = [
    L1(),
    Charbonnier(),
    FFT(),
    FFT(part="amplitude"),
    FFT(norm="backward"),
    Wavelet(),
    Wavelet(wave="db2", levels=2),
]


def images(dtype=torch.float32, size=(2, 3, 13, 18)):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]


def name(objective):
    return str(objective.settings())


def test_values_follow_their_formulas():
    restored, gt = images()
    d = restored.double() - gt.double()
    spectra = [torch.fft.fft2(x.double())[..., :10] for x in (restored, gt)]  # columns 0 .. w/2
    area = 13 * 18
    plane = spectra[0] - spectra[1]
    haar = Wavelet()(*(x[..., :12, :] for x in (restored, gt)))
    a, b, c, e = (d[..., i:12:2, j::2] for i in (0, 1) for j in (0, 1))
    bands = torch.stack([a + b + c + e, a + b - c - e, a - b + c - e, a - b - c + e]) / 2
    expected = {
        L1()(restored, gt): d.abs().mean(),
        Charbonnier(eps=0.1)(restored, gt): (d**2 + 0.01).sqrt().mean(),
        FFT(norm="backward")(restored, gt): (plane.real.abs() + plane.imag.abs()).mean() / 2,
        FFT()(restored, gt): (plane.real.abs() + plane.imag.abs()).mean() / 2 / area**0.5,
        FFT(part="amplitude")(restored, gt): (spectra[0].abs() - spectra[1].abs()).abs().mean() / area**0.5,
        haar: (bands[1:].abs().mean() + bands[0].abs().mean()) / 2,
    }
    for actual, value in expected.items():
        assert error(actual, value) < EXACT


@pytest.mark.parametrize("objective", ALL, ids=name)
def test_equal_images_are_the_minimum_and_gradients_are_finite_there(objective):
    _, gt = images()
    restored = gt.clone().requires_grad_()
    value = objective(restored, gt)
    smallest = 1e-3 if isinstance(objective, Charbonnier) else 0
    assert value.item() == pytest.approx(smallest, abs=1e-7)
    (gradient,) = torch.autograd.grad(value, restored)
    assert torch.isfinite(gradient).all()
    flat = torch.zeros(1, 3, 16, 16, requires_grad=True)  # most of its spectrum is exactly 0
    assert torch.isfinite(torch.autograd.grad(objective(flat, torch.ones(1, 3, 16, 16)), flat)[0]).all()


@pytest.mark.parametrize("objective", ALL, ids=name)
def test_bf16_autocast_computes_in_float32(objective):
    restored, gt = images()
    rounded = restored.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = objective(rounded, gt)
    assert value.dtype == torch.float32
    assert error(value, objective(rounded.double(), gt.double())) < 1e-5
    assert objective(restored.double(), gt.double()).dtype == torch.float64


def test_amplitude_ignores_a_shift_and_wavelet_levels_see_coarser_errors():
    image, _ = images(size=(1, 1, 16, 16))
    assert FFT(part="amplitude")(image.roll(3, -1), image) < 1e-6
    assert FFT()(image.roll(3, -1), image) > 0.1
    coarse = torch.zeros(1, 1, 16, 16)
    coarse[..., :8] = 1  # an edge on the grid of one level
    assert Wavelet(levels=1)(coarse, 0 * coarse) != Wavelet(levels=4)(coarse, 0 * coarse)


def test_settings_build_the_same_objective_again():
    objective = Wavelet(0.5, wave="db2", levels=3)
    assert objective.settings() == {"class_path": "Wavelet", "init_args": {"weight": 0.5, "wave": "db2", "levels": 3}}
    assert not objective.state_dict(), "checkpoints hold the network's tensors only"


def test_wrong_settings_are_said():
    with pytest.raises(UserError, match="objective L1: weight must be positive, got 0"):
        L1(0)
    with pytest.raises(UserError, match="levels must be at least 1, got 0"):
        Wavelet(levels=0)
