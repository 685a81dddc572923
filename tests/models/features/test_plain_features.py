import pytest
import torch
from torch.nn import functional as F

from zoo import models
from zoo.errors import UserError
from zoo.models.features.plain_features import PlainFeatures, detect
from zoo.models.weights import write_weights

SMALL = {"widths": [8, 16], "depths": [1, 2], "num_features": 5}


@pytest.mark.parametrize(
    "change",
    [{}, {"in_chans": 1}, {"widths": [16, 8]}, {"widths": [8, 8, 8], "depths": [1, 1, 3]}, {"num_features": 7}],
    ids=str,
)
def test_detection_round_trips_every_keyword(change):
    net = PlainFeatures(**SMALL | change)
    assert detect(net.state_dict()) | {"side": 64} == net.config


def test_the_side_that_weights_cannot_tell_travels_in_the_header(tmp_path):
    net = models.create({"family": "plain-features", **SMALL, "side": 32})
    assert models.load(write_weights(tmp_path / "w.safetensors", net)).side == 32
    assert models.load(net.state_dict(), side=48).side == 48


def test_every_size_becomes_one_vector_of_mean_0_and_variance_1():
    net = PlainFeatures(**SMALL).eval()
    for size in ((64, 64), (32, 32), (33, 95), (128, 64)):
        features = net(torch.rand(2, 3, *size))
        assert features.shape == (2, 5)
        torch.testing.assert_close(features.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
        torch.testing.assert_close(features.var(1, correction=0), torch.ones(2), atol=1e-2, rtol=0)


def test_larger_pictures_are_seen_at_the_same_size_as_small_ones():
    net = PlainFeatures(**SMALL).eval()
    large = torch.rand(2, 3, 128, 128)
    small = F.interpolate(large, (64, 64), mode="bicubic", antialias=True)
    torch.testing.assert_close(net(large), net(small))


def test_images_of_a_batch_do_not_see_each_other():
    net = PlainFeatures(**SMALL).eval()
    images = torch.rand(3, 3, 64, 64)
    torch.testing.assert_close(net(images)[1], net(images[1:2])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_chans": 0}, "PlainFeatures: in_chans must be at least 1, got 0"),
        ({"num_features": 0}, "num_features must be at least 1"),
        ({"side": -1}, "side must be at least 1"),
        ({"depths": [1]}, r"each stage needs a width and a depth >= 1, got \[8, 16\] and \[1\]"),
        ({"depths": [1, 0]}, "each stage needs a width and a depth >= 1"),
        ({"widths": [0, 8]}, "each stage needs a width and a depth >= 1"),
        ({"widths": [], "depths": []}, "each stage needs a width and a depth >= 1"),
    ],
)
def test_constructor_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        PlainFeatures(**SMALL | change)


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match=r"got \(1, 3, 31, 40\)"):
        PlainFeatures(**SMALL)(torch.rand(1, 3, 31, 40))
    with pytest.raises(ValueError, match=r"got \(1, 1, 40, 40\)"):
        PlainFeatures(**SMALL)(torch.rand(1, 1, 40, 40))


def test_it_is_small_enough_to_ship_and_restores_nothing():
    net = models.create("shapes-features")
    assert sum(p.numel() for p in net.parameters()) <= 300_000
    with pytest.raises(UserError, match="'shapes-features' restores no image, it is for features; see `zoo list`"):
        models.needs(net)


def test_compiles_without_a_graph_break():
    net = PlainFeatures(**SMALL).eval()
    image = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(image), net(image))
