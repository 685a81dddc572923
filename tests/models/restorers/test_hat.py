import json

import pytest
import torch
from torch.nn import functional as F

import zoo
from tests.helpers import golden, group, on_meta
from zoo.models.restorers.hat import HAT, VARIANTS, detect
from zoo.shipped import folder

TOLERANCE = 1e-5  # relative to the largest magnitude of each golden tensor, architecture.md section 5
TINY = {
    "img_size": 32,
    "embed_dim": 12,
    "depths": [2, 1],
    "num_heads": [2, 3],
    "window_size": 4,
    "compress_ratio": 3,
    "squeeze_factor": 4,
}
MANIFESTS = {
    f"hat-{size}x{scale}": folder("checkpoints") / "manifests" / f"hat-HAT{official}-x{scale}.keys.json"
    for size, official in (("s-", "-S"), ("", ""), ("l-", "-L"))
    for scale in (2, 3, 4)
}


def close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def official(name):
    facts, tensors = golden(name)
    net = HAT(**facts["config"]).eval()
    net.load_state_dict(group(tensors, "weight."))
    return net, facts, tensors


@pytest.mark.parametrize("name", ["hat", "hat_gray_x2"])
def test_every_golden_output_and_gradient_is_reproduced(name):
    net, _, tensors = official(name)
    expected = group(tensors, "output.")
    seen = {}
    for path, module in net.named_modules():
        if path in expected:
            module.register_forward_hook(lambda _m, _i, out, path=path: seen.__setitem__(path, out))
    lq = tensors["input.x"].clone().requires_grad_()
    restored = net(lq)
    loss = (restored - tensors["input.target"]).abs().mean()
    loss.backward()
    close(restored, expected["y"])
    close(loss[None], expected["l1_loss"])
    close(lq.grad, tensors["grad.input.x"])
    for path, output in seen.items():
        if path.endswith(".attn"):  # the official module hands back shifted windows, ours the tokens where they were
            size, shift = net.window_size, net.window_size // 2
            image = output.unflatten(1, lq.shape[2:]).roll((-shift, -shift), (1, 2))
            output = (
                image.unfold(1, size, size).unfold(2, size, size).permute(0, 1, 2, 4, 5, 3).flatten(0, 2).flatten(1, 2)
            )
        close(output, expected[path])
    assert set(seen) == {key for key in expected if not key.startswith(("y", "l1_loss"))}
    parameters = dict(net.named_parameters())
    for path, gradient in group(tensors, "grad.weight.").items():
        close(parameters[path].grad, gradient)


@pytest.mark.parametrize("name", ["hat", "hat_gray_x2"])
def test_official_padding_is_reproduced(name):
    net, _, tensors = official(name)
    lq = tensors["input.x_odd"]
    (h, w), size = lq.shape[2:], net.window_size
    padded = F.pad(lq, (0, -w % size, 0, -h % size), mode="reflect")
    with torch.inference_mode():
        restored = net(padded)[..., : h * net.upscale, : w * net.upscale]
    close(restored, tensors["output.y_odd_padded"])


@pytest.mark.parametrize("variant", MANIFESTS)
def test_official_manifest_loads_strictly_and_is_recognised(variant):
    shapes, state = json.loads(MANIFESTS[variant].read_text()), on_meta(MANIFESTS[variant])
    with torch.device("meta"):
        net = HAT(**VARIANTS[variant].config)
    net.load_state_dict(state, assign=True)
    family, found = zoo.models.detect(state)
    assert family == "hat"
    with torch.device("meta"):
        again = HAT(**found).state_dict()
    assert {key: list(value.shape) for key, value in again.items()} == shapes
    assert zoo.models._same_size(family, found) == variant


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"in_chans": 1},
        {"embed_dim": 24},
        {"depths": [1, 3], "num_heads": [2, 2]},
        {"depths": [1, 1, 1], "num_heads": [1, 2, 4]},
        {"window_size": 8, "overlap_ratio": 0.25},
        {"overlap_ratio": 1.0},
        {"compress_ratio": 5},
        {"squeeze_factor": 7},
        {"mlp_ratio": 4.0},
        {"mlp_ratio": 2.66},
        {"qkv_bias": False},
        {"ape": True, "img_size": 16},
        {"patch_norm": False},
        {"upscale": 1},
        {"upscale": 3},
        {"upscale": 4},
        {"upscale": 8},
        {"resi_connection": "identity"},
        {"num_feat": 16},
    ],
    ids=str,
)
def test_detection_round_trips_every_visible_keyword(change):
    torch.manual_seed(0)
    net = HAT(**TINY | change).eval()
    state = net.state_dict()
    found = detect(state)
    inexact = {"compress_ratio", "squeeze_factor", "mlp_ratio"}  # known by the width they lead to
    for key, value in change.items():
        assert key in inexact or found[key] == value, key
    again = HAT(**found).eval()
    again.load_state_dict(state)
    lq = torch.rand(1, net.in_chans, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(again(lq), net(lq))


def test_restoration_head_starts_near_the_identity_and_the_residual_is_bicubic():
    torch.manual_seed(0)
    lq = torch.rand(1, 3, 16, 16)
    net = HAT(**TINY, upscale=2, global_residual=True).eval()
    without = HAT(**TINY, upscale=2).eval()
    without.load_state_dict(net.state_dict())
    with torch.inference_mode():
        difference = net(lq) - (without(lq) - without.mean)
    torch.testing.assert_close(difference, F.interpolate(lq, scale_factor=2, mode="bicubic"))


def test_batch_order_does_not_matter():
    net = HAT(**TINY).eval()
    lq = torch.rand(3, 3, 8, 12)
    with torch.inference_mode():
        torch.testing.assert_close(net(lq.flip(0)), net(lq).flip(0))


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    nets = [HAT(**TINY, use_checkpoint=use, drop_path_rate=0.0) for use in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        net.train()(torch.ones(1, 3, 8, 8)).square().sum().backward()
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_drop_path_drops_whole_samples_only_in_training():
    net = HAT(**TINY, drop_path_rate=0.9)
    lq = torch.rand(2, 3, 8, 8)
    net.train()
    assert not torch.equal(net(lq), net(lq))
    net.eval()
    assert torch.equal(net(lq), net(lq))


def test_compiles_without_a_graph_break():
    net = HAT(**TINY | {"depths": [2], "num_heads": [2]}).eval()
    lq = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(lq), net(lq))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"upsampler": ""}, "upsampler must be 'pixelshuffle'"),
        ({"upscale": 5}, r"upscale 1, 2, 3, 4 or 8.*got 1, 5"),
        ({"num_heads": [5, 2]}, r"one divisor of embed_dim=12 per group.*got \[5, 2\]"),
        ({"img_size": 2}, "img_size must be at least window_size=4"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"embed_dim": -12}, "embed_dim must be at least 1, got -12"),
        ({"compress_ratio": 0}, "compress_ratio must be at least 1, got 0"),
        ({"squeeze_factor": 13}, "squeeze_factor must be at most embed_dim=12, got 3, 13"),
        ({"depths": [], "num_heads": []}, r"depths must list at least one group of at least one block, got \[\]"),
        ({"depths": [2, 0]}, r"at least one block, got \[2, 0\]"),
        ({"depths": [2]}, r"num_heads must be one divisor of embed_dim=12 per group of depths=\[2\]"),
        ({"num_heads": [2, 0]}, r"num_heads must be one divisor of embed_dim=12"),
        ({"mlp_ratio": -1.0}, r"embed_dim \* mlp_ratio at least 1"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate in \[0, 1\)"),
        ({"img_range": 0.0}, "img_range above 0"),
    ],
)
def test_constructor_names_what_is_wrong(keywords, message):
    with pytest.raises(ValueError, match=message):
        HAT(**TINY | keywords)


def test_input_that_is_no_multiple_of_the_window_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 9, 8\)"):
        HAT(**TINY)(torch.rand(1, 3, 9, 8))
