import json

import pytest
import torch

import zoo
from tests.helpers import golden, group, on_meta
from zoo.models.restorers.craft import CRAFT, VARIANTS, detect
from zoo.pipelines import tiling
from zoo.shipped import folder

TOLERANCE = 1e-4  # absolute; float32 and float64 of the official code differ by 4e-6
TINY = {"embed_dim": 32, "depths": [1], "num_heads": [4], "split_size_0": 2, "split_size_1": 4, "upscale": 2}
MANIFESTS = {
    f"craft-x{scale}": folder("checkpoints") / "manifests" / f"craft-CRAFT_MODEL_X{scale}.keys.json"
    for scale in (2, 3, 4)
}


def close(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE


def official(name):
    facts, tensors = golden(name)
    absent = ("img_size", "window_size")  # swallowed without an effect by the official constructor
    net = CRAFT(**{key: value for key, value in facts["config"].items() if key not in absent}).eval()
    net.load_state_dict(group(tensors, "weight."))
    return net, tensors


@pytest.mark.parametrize("name", ["craft", "craft_wide"])
def test_every_golden_output_is_reproduced(name):
    net, tensors = official(name)
    expected = group(tensors, "inter.")
    seen = {}
    for path, module in net.named_modules():
        known = path.replace("residual_group.", "")
        if known in expected:
            module.register_forward_hook(lambda _m, _i, out, known=known: seen.__setitem__(known, out))
    with torch.inference_mode():
        close(net(tensors["input.0"]), tensors["output.0"])
        for path in expected:
            if path.endswith(".pos"):  # not asked at the narrow width, where it says nothing
                bias = net.get_submodule(path.replace("0.srwa", "0.residual_group.srwa"))
                seen[path] = bias(net.biases_h if ".attns.0." in path else net.biases_v)
    shift = (
        {"attns.0": (-2, -8), "attns.1": (-8, -2)} if name == "craft" else {"attns.0": (-1, -4), "attns.1": (-4, -1)}
    )
    for path, output in expected.items():
        found = seen[path]
        if path[-7:] in shift:  # the official module hands back shifted maps, ours heads of tokens where they were
            found = found.transpose(1, 2).flatten(2).unflatten(1, tensors["input.0"].shape[2:])
            found = found.roll(shift[path[-7:]], (1, 2))
        close(found, output)


def test_both_official_paddings_are_reproduced():
    net, tensors = official("craft")
    for padding, name in (("mirror_always", "output.1"), ("reflect", "output.2")):
        close(tiling.restore(net, tensors["input.1"], padding=padding), tensors[name])


@pytest.mark.parametrize("variant", MANIFESTS)
def test_official_manifest_loads_strictly_and_is_recognised(variant):
    state = on_meta(MANIFESTS[variant])
    with torch.device("meta"):
        net = CRAFT(**VARIANTS[variant].config)
    net.load_state_dict(state, assign=True)
    family, found = zoo.models.detect(state)
    assert family == "craft"
    with torch.device("meta"):
        again = CRAFT(**found).state_dict()
    assert {key: list(value.shape) for key, value in again.items()} == json.loads(MANIFESTS[variant].read_text())
    assert zoo.models._same_size(family, found) == variant


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"in_chans": 1},
        {"embed_dim": 48},
        {"depths": [2, 1], "num_heads": [2, 4]},
        {"split_size_0": 2, "split_size_1": 2},
        {"split_size_0": 4, "split_size_1": 2},
        {"mlp_ratio": 1.5},
        {"ffn_factor": 2.0},
        {"upscale": 1},
        {"upscale": 3},
        {"resi_connection": "identity"},
    ],
    ids=str,
)
def test_detection_round_trips_every_visible_keyword(change):
    torch.manual_seed(0)
    net = CRAFT(**TINY | change).eval()
    state = net.state_dict()
    found = detect(state)
    for key, value in change.items():
        assert key in ("mlp_ratio", "ffn_factor") or found[key] == value, key
    again = CRAFT(**found).eval()
    again.load_state_dict(state)
    lq = torch.rand(1, net.in_chans, 8, 12)
    with torch.inference_mode():
        torch.testing.assert_close(again(lq), net(lq))


def test_a_bias_that_cannot_tell_positions_changes_nothing():
    torch.manual_seed(0)
    net = CRAFT(**TINY).double().eval()
    lq = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert not any(
        block.pos.tells for group in net.layers for s in group.residual_group.srwa_blocks for block in s.attns
    )
    without = net(lq)
    torch.testing.assert_close(net.train()(lq), without, rtol=0, atol=1e-12)


def test_every_parameter_has_a_gradient_in_training():
    net = CRAFT(**TINY)
    net(torch.rand(1, 3, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_masked_shifts_keep_opposite_borders_apart():
    """What changes in the last row is seen in the first one only where shifted windows wrap."""
    reached = {}
    for masked in (False, True):
        block = CRAFT(**TINY, mask_shift=masked).double().eval().layers[0].residual_group.srwa_blocks[1].attns[0]
        torch.manual_seed(1)
        qkv = torch.randn(3, 1, 2, 64, 8, dtype=torch.float64)
        changed = qkv.clone()
        changed[:, :, :, -8:] += 1  # the last row of an 8x8 map
        outs = [block(x.unbind(0), (8, 8), None, None) for x in (qkv, changed)]
        reached[masked] = not torch.equal(outs[0][:, :, :8], outs[1][:, :, :8])
    assert reached == {False: True, True: False}


def test_a_dead_channel_leaves_gradients_finite():
    net = CRAFT(**TINY)
    with torch.no_grad():
        net.layers[0].residual_group.hf_blocks[0].attn.q.weight.zero_()
    net(torch.rand(1, 3, 8, 8)).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_batch_order_does_not_matter():
    net = CRAFT(**TINY).eval()
    lq = torch.rand(3, 3, 8, 12)
    with torch.inference_mode():
        torch.testing.assert_close(net(lq.flip(0)), net(lq).flip(0))


def test_compiles_without_a_graph_break():
    net = CRAFT(**TINY).eval()
    lq = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(lq), net(lq))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"embed_dim": 31}, "embed_dim must be even and at least 32, got 31"),
        ({"depths": []}, r"depths must list at least one group of at least one fusion, got \[\]"),
        ({"num_heads": [3]}, r"one even divisor of embed_dim=32 per group.*got \[3\]"),
        ({"upscale": 5}, "upscale must be 1, 2, 3 or 4.*got 5"),
        ({"resi_connection": "3conv"}, "resi_connection '1conv' or 'identity', got 2, '3conv'"),
        ({"ffn_factor": 0.0}, r"embed_dim \* ffn_factor must be at least 1"),
        ({"split_size_0": 0}, "split_size_0 must be at least 1, got 0"),
        ({"img_range": -1.0}, "img_range above 0"),
    ],
)
def test_constructor_names_what_is_wrong(keywords, message):
    with pytest.raises(ValueError, match=message):
        CRAFT(**TINY | keywords)


def test_input_that_fits_no_windows_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"multiples of 4, got \(1, 3, 9, 8\)"):
        CRAFT(**TINY)(torch.rand(1, 3, 9, 8))
