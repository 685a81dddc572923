import pytest
import torch

from tests.helpers import error, golden
from zoo.data.blur import usm
from zoo.errors import UserError
from zoo.layers.vgg import VGG19
from zoo.tasks.objectives import FFT, L1, Charbonnier, Pearson, Perceptual, Wavelet

EXACT = 1e-6  # relative, float32 sums over a few thousand values
ALL = [
    L1(),
    Charbonnier(),
    FFT(),
    FFT(part="amplitude"),
    FFT(norm="backward"),
    Wavelet(),
    Wavelet(wave="db2", levels=2),
    Pearson(),
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


def test_correlation_equals_the_official_value_and_a_flat_target_counts_half():
    _, tensors = golden("histoformer")
    restored, gt = tensors["input.loss_pred"], tensors["input.loss_gt"]
    assert error(Pearson()(restored, gt)[None], tensors["output.loss_pearson"]) < EXACT
    assert Pearson()(restored[2:], gt[2:]).item() == pytest.approx(0.5)
    brighter = Pearson()(0.5 * restored + 0.3, restored)
    assert brighter.item() == pytest.approx(0, abs=1e-6), "gain and offset do not matter"
    restored[0] = torch.nan
    assert Pearson()(restored, gt) == Pearson()(restored[1:], gt[1:])


@pytest.fixture
def vgg(tmp_path, monkeypatch):
    """A file as torchvision's, with random numbers in the place of trained ones."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    torch.manual_seed(0)
    state = VGG19().state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "vgg19-dcbb9e9d.pth")
    return tmp_path / "vgg19-dcbb9e9d.pth"


def test_features_are_compared_before_their_relu_by_the_weights_of_the_layers(vgg):
    restored, gt = images(size=(2, 3, 16, 20))
    found = Perceptual(layers={"conv1_1": 2.0, "conv5_4": 0.5})
    network = VGG19()
    network.load_state_dict({k: v for k, v in torch.load(vgg).items() if not k.startswith("classifier")})
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    first, last = ([network.features[:n]((x - mean) / std) for x in (restored, gt)] for n in (1, 35))
    expected = 2 * (first[0] - first[1]).abs().mean() + 0.5 * (last[0] - last[1]).abs().mean()
    assert error(found(restored, gt), expected) < EXACT
    usual = Perceptual()
    assert usual.layers == {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1}
    assert usual(gt, gt) == 0
    restored.requires_grad_()
    usual(restored, gt).backward()
    assert restored.grad.abs().min() > 0
    assert not usual.state_dict()
    assert not list(usual.parameters()), "nobody trains or stores these weights"
    assert torch.isfinite(usual(*images(size=(1, 1, 16, 16)))), "gray images too"


def test_the_weights_of_vgg_are_a_file_and_their_lack_is_one_sentence(vgg, tmp_path):
    settings = Perceptual(0.5, str(vgg), {"conv1_2": 1.0}).settings()["init_args"]
    assert settings == {"weight": 0.5, "file": str(vgg), "layers": {"conv1_2": 1.0}, "usm": False}
    with pytest.raises(FileNotFoundError, match=r"elsewhere\.pth is neither here nor in .* fetch it from https://down"):
        Perceptual(file="elsewhere.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth lacks or misshapes features\.0\.weight; give torchvision's"):
        Perceptual(file=str(tmp_path / "other.pth"))
    torch.save({"features.0.weight": print}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="could run code"):
        Perceptual(file=str(tmp_path / "evil.pth"))
    with pytest.raises(UserError, match=r"no layer 'conv6_1'\. Did you mean"):
        Perceptual(layers={"conv6_1": 1.0})
    vgg.unlink()
    with torch.device("meta"):
        Perceptual()  # `zoo check` sketches recipes on machines that lack the file


def test_a_sharpened_target_is_compared_where_asked_for():
    restored, gt = images(size=(1, 3, 40, 32))
    assert L1(usm=True)(restored, gt) == L1()(restored, usm(gt))
    assert L1(usm=True)(restored, gt) != L1()(restored, gt)
    with pytest.raises(UserError, match="sides must be above 25 pixels"):
        L1(usm=True)(*images(size=(1, 3, 25, 40)))
