import pytest
import torch

import zoo.models
from zoo.models.restorers.plain_conv import PlainConv, detect

SMALL = {"embed_dim": 6, "depth": 2, "num_feat": 4}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"in_chans": 1},
        {"embed_dim": 8},
        {"depth": 5},
        {"num_feat": 8},
        {"upscale": 3},
        {"upscale": 4},
        {"upscale": 1},
    ],
    ids=str,
)
def test_detection_round_trips_every_keyword(change):
    net = PlainConv(**SMALL | change)
    assert detect(net.state_dict()) == net.config


def test_any_size_goes_in_and_the_upscaled_size_comes_out():
    for upscale in (1, 2, 3):
        net = PlainConv(**SMALL, upscale=upscale)
        assert net(torch.rand(2, 3, 7, 5)).shape == (2, 3, 7 * upscale, 5 * upscale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_chans": 0}, "PlainConv: in_chans must be at least 1, got 0"),
        ({"embed_dim": -3}, "embed_dim must be at least 1, got -3"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"num_feat": 0}, "num_feat must be at least 1"),
        ({"upscale": 5}, "upscale must be 1, 2, 3, 4 or 8, got 5"),
    ],
)
def test_constructor_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        PlainConv(**SMALL | change)


def test_reach_is_what_the_network_says():
    net = PlainConv(**SMALL).eval()
    overlap = zoo.models.needs(net).overlap
    lq = torch.rand(1, 3, 40, 40)
    far = lq.clone()
    far[..., 39] += 1
    with torch.inference_mode():
        changed = (net(far) - net(lq)).abs().amax((0, 1, 2))  # one value a column
    assert changed[: 2 * (39 - overlap)].max() == 0
    assert changed[2 * 39 :].min() > 0


def test_it_is_as_large_as_the_network_that_it_is_the_control_of():
    sizes = [
        sum(p.numel() for p in zoo.models.create(name).parameters()) for name in ("plain-conv-tiny-x2", "hat-tiny-x2")
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.03


def test_compiles_without_a_graph_break():
    net = PlainConv(**SMALL).eval()
    lq = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(lq), net(lq))
