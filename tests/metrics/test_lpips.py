import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from zoo.errors import UserError
from zoo.metrics import lpips
from zoo.metrics.lpips import LPIPS, load

CLOSE = 1e-4  # relative, float32 through up to 13 convolutions against float64
SIZES = {"alex": (70, 67), "vgg": (40, 33)}
# Place in torchvision's `features` of each convolution; what comes before it; after which a map is taken.
ALEX = [
    (0, 4, 2, False, True),
    (3, 1, 2, True, True),
    (6, 1, 1, True, True),
    (8, 1, 1, False, True),
    (10, 1, 1, False, True),
]
VGG = [
    (place, 1, 1, place in (5, 10, 17, 24), place in (2, 7, 14, 21, 28))
    for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
]


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def backbone(kind):
    """Random weights in torchvision's layout, classifier included."""
    network = LPIPS(kind)
    torch.manual_seed(0)
    names = {name: ".".join(["features", *name.split(".")[2:]]) for name in network.state_dict() if "net." in name}
    state = {new: torch.randn(network.state_dict()[old].shape) * 0.1 for old, new in names.items()}
    return state | {"classifier.1.weight": torch.zeros(2, 2)}


def by_hand(kind, state, heads, a, b):
    """Equation 1 in float64, from torchvision's names."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    a, b = ((2 * x.double() - 1 - shift) / scale for x in (a, b))
    total, taken = 0, 0
    for place, stride, padding, pooled, taken_here in ALEX if kind == "alex" else VGG:
        weight, bias = (state[f"features.{place}.{part}"].double() for part in ("weight", "bias"))
        maps = []
        for x in (a, b):
            x = F.max_pool2d(x, 3 if kind == "alex" else 2, 2) if pooled else x
            maps.append(F.conv2d(x, weight, bias, stride, padding).relu())
        a, b = maps
        if taken_here:
            unit = [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in maps]
            weighed = (unit[0] - unit[1]).pow(2) * heads[f"lin{taken}.model.1.weight"].double()
            total, taken = total + weighed.sum(1).mean((1, 2)), taken + 1
    return total


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_distance_is_that_of_equation_1_with_the_weights_that_torchmetrics_brings(kind, tmp_path):
    state = backbone(kind)
    torch.save(state, tmp_path / "net.pth")
    network = load(tmp_path / "net.pth")
    assert network.kind == kind
    heads = lpips._read(lpips._heads(kind))
    assert min(head.min() for head in heads.values()) >= 0, "the authors keep them so"
    a, b = noise(2, 3, *SIZES[kind]), noise(2, 3, *SIZES[kind], seed=1)
    expected = by_hand(kind, state, heads, a, b)
    assert (expected > 1e-3).all()
    assert network(a, b).double() == pytest.approx(expected, rel=CLOSE)
    assert network(a, a).abs().max() == 0
    assert network(a, b) == pytest.approx(network(b, a))


def test_every_official_layout_gives_the_same_network(tmp_path, monkeypatch):
    state, heads = backbone("alex"), lpips._read(lpips._heads("alex"))
    torch.save(state, tmp_path / "torchvision.pth")
    expected = load(tmp_path / "torchvision.pth").state_dict()
    whole = dict(expected) | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    whole |= {key.replace("lin", "lins."): value for key, value in heads.items()}
    torch.save(whole, tmp_path / "lpips.pth")
    torch.save(heads, tmp_path / "alex.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(FileNotFoundError, match=r"file .*alexnet-owt-7be5be79\.pth not found"):
        load(tmp_path / "alex.pth")
    for source in (None, tmp_path / "alex.pth", tmp_path / "lpips.pth"):
        if source is None:
            (tmp_path / "hub/checkpoints").mkdir(parents=True)
            torch.save(state, tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth")
        found = load(source).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_smallest_image_is_the_one_whose_last_map_has_a_pixel(kind):
    torch.manual_seed(0)
    network, side = LPIPS(kind), lpips.TRUNKS[kind].smallest
    assert network.between(noise(3, side, side), noise(3, side, side, seed=1)) is not None
    assert network.between(noise(3, side - 1, side), noise(3, side - 1, side)) is None
    with pytest.raises(RuntimeError):
        network(noise(1, 3, side - 1, side - 1), noise(1, 3, side - 1, side - 1))


def test_images_are_rounded_to_8_bits_and_gray_is_seen_as_rgb():
    torch.manual_seed(0)
    network = LPIPS("vgg")
    gt = (noise(1, 32, 32) * 255).round() / 255
    assert network.between(gt + 0.001, gt) == 0
    assert network.between(noise(1, 32, 32, seed=1), gt) == pytest.approx(
        network.between(noise(1, 32, 32, seed=1).expand(3, -1, -1), gt.expand(3, -1, -1))
    )


def test_wrong_files_are_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"file .*none\.pth not found"):
        load(tmp_path / "none.pth")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="neither AlexNet nor VGG16"):
        load(tmp_path / "other.safetensors")
    state = backbone("alex")
    del state["features.3.bias"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"net\.slice2\.3\.bias and 0 more are missing"):
        load(tmp_path / "cut.pth")
