import itertools

import numpy as np
import pytest
import torch
from torch import nn

from zoo import models
from zoo.data.blur import filter2d, gaussian_kernel
from zoo.data.shapes import Shapes
from zoo.errors import UserError
from zoo.metrics.fid import feature_network, features, fid, kid, scores, subset_size
from zoo.models.weights import write_weights

EXACT = 1e-9  # relative; both sides are float64, the reference by another decomposition
RANDOM = {"family": "plain-features", "widths": [8, 16], "depths": [1, 1], "num_features": 16}


def drawn(count, width=12, seed=0, shift=0.0, stretch=1.0):
    """Correlated features of a known Gaussian."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    noise = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return stretch * noise @ mix + shift


def root(matrix):
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def reference_fid(a, b):
    """The definition, with (cov_a cov_b)^(1/2) traced through the similar matrix (A^(1/2) B A^(1/2))^(1/2)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    shared = root(root(cov_a) @ cov_b @ root(cov_a))
    return ((a.mean(0) - b.mean(0)).square().sum() + (cov_a + cov_b - 2 * shared).trace()).item()


def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def reference_kid(a, b):
    """Means over all pairs of different images."""
    within = [(kernel(x, x).sum() - kernel(x, x).diagonal().sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (sum(within) - 2 * kernel(a, b).mean()).item()


def biased_kid(a, b):
    """The same with the pairs of an image and itself."""
    return (kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()).item()


def network():
    """Random weights: what the distances do must not hang on what a network has learned."""
    torch.manual_seed(0)
    return models.create(RANDOM)


def pictures(count, seed=0):
    world = Shapes(seed, side=32)
    return torch.stack([world[number]["image"] for number in range(count)])


@pytest.mark.parametrize(("shift", "stretch"), [(0.0, 1.0), (0.5, 1.0), (0.0, 1.7), (-2.0, 0.3)])
def test_fid_is_the_distance_of_two_gaussians(shift, stretch):
    a, b = drawn(50, seed=1), drawn(40, seed=2, shift=shift, stretch=stretch)
    assert fid(a, b) == pytest.approx(reference_fid(a, b), rel=EXACT)
    assert fid(a, b) == pytest.approx(fid(b, a), rel=EXACT)
    assert fid(a.float(), b.float()) == pytest.approx(reference_fid(a.float().double(), b.float().double()), rel=EXACT)


def test_fid_of_a_shift_is_its_square():
    a = drawn(50)
    assert fid(a, a + 0.5) == pytest.approx(12 * 0.25, rel=EXACT)


def test_fid_of_equal_sets_is_0_also_where_features_hang_together():
    a = drawn(50)
    a[:, 3] = a[:, 2]  # a covariance without full rank
    for seed in (0, 1):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(seed))
        # the root of a rounding error of 1e-16 relative to eigenvalues of up to 1e3
        assert 0 <= fid(a, a[order]) < 1e-5


def test_kid_is_the_unbiased_estimate():
    a, b = drawn(60, seed=1), drawn(60, seed=2, shift=0.1)
    mean, spread = kid(a, b, subsets=3, size=60)
    assert mean == pytest.approx(reference_kid(a, b), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-9 * abs(mean))


def test_kid_of_two_samples_of_one_distribution_is_around_0():
    pairs = [(drawn(60, 4, 2 * n), drawn(60, 4, 2 * n + 1)) for n in range(100)]
    values = [kid(a, b, subsets=1, size=60)[0] for a, b in pairs]
    error = np.std(values) / len(values) ** 0.5
    # Three standard errors of the mean: of all seeds one in 370 would fail, and these are fixed.
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0 < max(values)
    assert np.mean([biased_kid(a, b) for a, b in pairs]) > 3 * error, "a biased estimate would be found out"


def test_kid_draws_the_same_subsets_and_leaves_the_global_generator_alone():
    a, b = drawn(40, seed=1), drawn(50, seed=2)
    state = torch.random.get_rng_state()
    assert kid(a, b, size=10) == kid(a, b, size=10)
    assert kid(a, b, size=10) != kid(a, b, size=10, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert [subset_size(n, 5000) for n in (2, 301, 2000, 5000)] == [1, 150, 1000, 1000]


def blurred(images, strength):
    return filter2d(images, gaussian_kernel(11, 0.8 * strength))


def noised(images, strength):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    return images + 0.05 * strength * noise


def recoloured(images, strength):
    return images * torch.tensor([1.0, 1 - 0.1 * strength, 1 - 0.2 * strength])[:, None, None]  # ever redder


@pytest.mark.parametrize("spoil", [blurred, noised, recoloured])
def test_distances_grow_with_damage(spoil):
    net, real = network(), pictures(60)
    theirs = features(real, net)
    ours = [features(spoil(real, strength) if strength else real, net) for strength in range(4)]
    distances = [fid(one, theirs) for one in ours]
    assert distances[0] < 1e-5, "as for equal sets"
    for values in (distances, [kid(one, theirs, subsets=1, size=60)[0] for one in ours]):
        assert all(before < after for before, after in itertools.pairwise(values)), values


def test_features_are_taken_from_pictures_as_files_hold_them():
    net, images = network(), pictures(35) * 0.9 + 0.003
    arrays = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    seen = []
    expected = features(images, net, progress=seen.append)
    assert expected.dtype == torch.float64
    assert seen == [32, 35]
    torch.testing.assert_close(features(iter(arrays), net), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(features([array / 255 for array in arrays], net), expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(expected[34:], net((images[34:] * 255).round() / 255).double(), atol=1e-6, rtol=0)


def test_networks_are_names_files_and_modules(tmp_path):
    net = network()
    file = write_weights(tmp_path / "mine.safetensors", net)
    images = pictures(40)
    for source in (net, file, str(file)):
        values = scores(images, pictures(44, seed=1), source)
        assert [score.value for score in values] == [score.value for score in scores(images, pictures(44, 1), net)]
    assert values[0].label == "FID (mine.safetensors, 40 and 44 images)"
    assert values[1].label == "KID (mine.safetensors, 40 and 44 images, 50 subsets of 20)"
    assert str(values[0]) == f"{values[0].value:.4g}"
    assert str(values[1]) == f"{values[1].value:.4g} ± {values[1].spread:.2g}"


def test_a_network_that_trains_is_measured_at_rest_and_trains_on():
    class Dropping(nn.Module):
        num_features = 2

        def forward(self, image):
            return nn.functional.dropout(image.mean((2, 3))[:, :2], 0.5, self.training)

    net = Dropping().train()
    assert torch.equal(features(pictures(3), net), features(pictures(3), net))
    assert net.training


def test_missing_weights_leave_a_gap_that_says_why(tmp_path):
    for source, said in (
        (tmp_path / "none.pth", f"n/a (weights file {tmp_path}/none.pth not found; give a file, or shapes-features"),
        ("inception-2015", "n/a (load: the weights of 'inception-2015' are not shipped; fetch them from https"),
    ):
        for score in scores(pictures(1), pictures(1), source):
            assert score.value is None
            assert str(score).startswith(said)
    assert score.label == "KID (inception-2015)"


def test_too_few_images_leave_a_gap_that_says_why():
    first, second = scores(pictures(3), pictures(3), network())
    assert str(first) == "n/a (FID: 16 features need more than 16 images on each side, got 3; give more)"
    assert str(second) == "n/a (KID: 50 subsets of 1 cannot be taken of 3 images; give more images)"
    first, second = scores(pictures(10), pictures(10), network())
    assert first.value is None
    assert second.value is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fid(drawn(12), drawn(50)),
            "FID: 12 features need more than 12 images on each side, got 12; give more",
        ),
        (lambda: kid(drawn(3), drawn(50)), "KID: 50 subsets of 1 cannot be taken of 3 images; give more images"),
        (lambda: kid(drawn(9), drawn(9), size=10), "KID: 50 subsets of 10 cannot be taken of 9 images"),
        (lambda: fid(drawn(20) * torch.nan, drawn(20)), "features are not all numbers; the network's weights"),
        (lambda: features([], network()), "no images were given"),
        (lambda: features([torch.rand(1, 32, 32)], network()), r"got torch.float32 \(1, 32, 32\)"),
        (lambda: features([np.zeros((3, 32, 32))], network()), r"arrays \(h, w, 3\) .*, got float64 \(3, 32, 32\)"),
        (lambda: features([np.zeros((32, 32, 3), np.int64)], network()), r"got int64 \(32, 32, 3\)"),
        (lambda: features(["a.png"], network()), r"got str \(\)"),
        (lambda: features([torch.full((3, 32, 32), torch.nan)], network()), "values that are not numbers"),
        (lambda: features([torch.rand(3, 32, 32), torch.rand(3, 40, 32)], network()), "must have one size; resize"),
        (lambda: feature_network("plain-conv-tiny-x2"), "plain-conv-tiny-x2 is no feature network; give shapes-feat"),
        (lambda: feature_network("shapes-feature"), "Did you mean 'shapes-features'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_features_of_two_networks_are_not_compared():
    with pytest.raises(ValueError, match=r"got \(50, 12\) and \(50, 4\)"):
        fid(drawn(50), drawn(50, 4))
