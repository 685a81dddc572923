import json

import pytest
import torch

import zoo
from tests.helpers import golden, group, on_meta
from zoo.models.restorers.histoformer import VARIANTS, Histoformer, detect
from zoo.shipped import folder

TOLERANCE = 1e-4  # absolute, float32, on inputs that were chosen so that rounding changes no order
EXACT = 1e-9  # absolute, float64: the only precision in which any input can be compared
TINY = {"dim": 12, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1}
MANIFEST = folder("checkpoints") / "manifests" / "histoformer-net_g_best.keys.json"


@pytest.fixture(scope="module")
def official():
    facts, tensors = golden("histoformer")
    absent = ("out_channels", "dual_pixel_task")  # as many as go in; an unused layer
    net = Histoformer(**{key: value for key, value in facts["config"].items() if key not in absent}).eval()
    net.load_state_dict(group(tensors, "weight."))
    return net, tensors


def close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance


def test_the_golden_output_is_reproduced(official):
    net, tensors = official
    expected = {
        path.removesuffix(".output"): output
        for path, output in group(tensors, "inter.").items()
        if path.endswith(".output") and ".attn_g." not in path
    }
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, path=path: seen.__setitem__(path, out))
        for path, module in net.named_modules()
        if path in expected
    ]
    with torch.inference_mode():
        close(net(tensors["input.0"]), tensors["output.0"])
    for hook in hooks:
        hook.remove()
    seen.pop("reduce_chan_level_1", None)  # called as a matrix, not as a module
    assert set(seen) == set(expected) - {"reduce_chan_level_1"}
    for path, output in seen.items():
        close(output, expected[path])


def test_any_input_is_reproduced_in_float64(official):
    net, tensors = official
    exact = Histoformer(**net.config).double().eval()
    exact.load_state_dict(net.state_dict())
    with torch.inference_mode():
        for number in (0, 1):
            close(exact(tensors[f"input.{number}"].double()), tensors[f"output64.{number}"], EXACT)


@pytest.mark.parametrize("path", ["encoder_level2.0.attn_g", "latent.0.attn_g", "refinement.0.attn_g"])
def test_each_attention_is_reproduced_from_its_own_input(official, path):
    net, tensors = official
    inter = group(tensors, f"inter.{path}.")
    attention = net.get_submodule(path)
    seen = []
    handle = attention.register_forward_hook(lambda _m, _i, out: seen.append(out))
    sort, orders = attention._sort, []

    def noted(x, axis):
        values, order = sort(x, axis)
        orders.append(order)
        return values, order

    attention._sort = noted
    try:
        with torch.inference_mode():
            close(attention(inter["input"]), inter["output"])
    finally:
        del attention._sort
        handle.remove()
    for order, name in zip(orders, ("idx_h", "idx_w", "idx_v"), strict=True):
        assert torch.equal(order.int(), inter[name]), name


def test_equal_values_keep_their_order(official):
    net, tensors = official
    with torch.inference_mode():
        close(net.encoder_level2[0].attn_g(tensors["ties.input"]), tensors["ties.output_stable"])


def test_the_official_manifest_loads_strictly_and_is_recognised():
    state = on_meta(MANIFEST)
    with torch.device("meta"):
        net = Histoformer(**VARIANTS["histoformer-allweather"].config)
    net.load_state_dict(state, assign=True)
    family, found = zoo.models.detect(state)
    assert family == "histoformer"
    with torch.device("meta"):
        again = Histoformer(**found).state_dict()
    assert {key: list(value.shape) for key, value in again.items()} == json.loads(MANIFEST.read_text())
    assert zoo.models._same_size(family, found) == "histoformer-allweather"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"inp_channels": 1},
        {"dim": 24},
        {"num_blocks": [1, 2, 1, 3]},
        {"num_refinement_blocks": 2},
        {"heads": [2, 2, 3, 6]},
        {"ffn_expansion_factor": 2.0},
        {"bias": True},
    ],
    ids=str,
)
def test_detection_round_trips_every_visible_keyword(change):
    torch.manual_seed(0)
    net = Histoformer(**TINY | change).double().eval()
    state = net.state_dict()
    found = detect(state)
    for key, value in change.items():
        assert found[key] == value, key
    again = Histoformer(**found).double().eval()
    again.load_state_dict(state)
    lq = torch.rand(1, net.inp_channels, 8, 16, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(again(lq), net(lq))


def test_padding_of_the_sorted_pixels_is_seen_by_nobody():
    """A map of 9 pixels in 8 bins is filled up; what comes out is as finite and as long as what went in."""
    torch.manual_seed(0)
    attention = Histoformer(**TINY).latent[0].attn_g.double()
    features = torch.randn(2, 96, 3, 3, dtype=torch.float64)
    out = attention(features)
    assert out.shape == features.shape
    assert torch.isfinite(out).all()
    with torch.no_grad():
        attention.temperature.fill_(0)  # all look at all alike, what is left over at nothing: 96 of 97 parts
    pairs = torch.randn(2, 96, 9, dtype=torch.float64)
    for bins in (True, False):
        seen = attention._attend(pairs, pairs, torch.ones_like(pairs), bins)
        padded = attention._split(torch.ones_like(pairs), bins, attention.num_heads)
        expected = padded.sum(2, keepdim=True) / 97
        assert torch.allclose(attention._split(seen, bins, attention.num_heads).amax(), expected.amax())


def test_gradients_reach_every_parameter():
    net = Histoformer(**TINY)
    net(torch.rand(1, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_batch_order_does_not_matter():
    net = Histoformer(**TINY).double().eval()
    lq = torch.rand(3, 3, 8, 16, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(net(lq.flip(0)), net(lq).flip(0))


def test_compiles_without_a_graph_break():
    net = Histoformer(**TINY).double().eval()
    lq = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(lq), net(lq))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dim": 7}, "dim must be even and at least 2, got 7"),
        ({"num_blocks": [1, 1, 1]}, r"four numbers from 1 up, got \[1, 1, 1\]"),
        ({"heads": [1, 2, 5, 8]}, r"heads must divide the levels' widths \[12, 24, 48, 96\]"),
        ({"ffn_expansion_factor": 2.66, "dim": 48}, r"multiples of 4, got 2.66, which makes \[127"),
        ({"LayerNorm_type": "None"}, "LayerNorm_type must be WithBias or BiasFree, got 'None'"),
        ({"num_refinement_blocks": 0}, "num_refinement_blocks must be at least 1, got 0"),
    ],
)
def test_constructor_names_what_is_wrong(keywords, message):
    with pytest.raises(ValueError, match=message):
        Histoformer(**TINY | keywords)


def test_input_that_is_no_multiple_of_eight_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 9, 8\)"):
        Histoformer(**TINY)(torch.rand(1, 3, 9, 8))


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (16, 56)], ids=str)
def test_fewer_channels_at_a_time_are_the_same_sums(size):
    torch.manual_seed(0)
    sizes = {"dim": 14, "num_blocks": [1, 1, 1, 1], "num_refinement_blocks": 1, "heads": [1, 2, 4, 7]}
    network = zoo.create({"family": "histoformer", **sizes, "ffn_expansion_factor": 2.0, "bias": True}).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected = network(image)
        network.spare_memory(True)
        assert (network(image) - expected).abs().max() < 1e-9 * expected.abs().max()
        network.spare_memory(False)
        assert torch.equal(network(image), expected)
