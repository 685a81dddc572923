import pytest
import torch
from torch.nn import functional as F

from tests.helpers import error, golden, group, on_meta
from zoo.layers.discriminators import SpectralConv2d, UNetDiscriminatorSN
from zoo.shipped import folder

EXACT = 1e-5  # relative to the largest logit or gradient; float32 convolutions in another order


@pytest.fixture
def official():
    facts, tensors = golden("hat_unetdisc")
    network = UNetDiscriminatorSN(**facts["config"])
    network.load_state_dict(group(tensors, "weight."))
    return network, tensors


def test_logits_loss_and_gradients_equal_the_official_ones(official):
    network, tensors = official
    image = tensors["input.x"]
    assert error(network.eval()(image), tensors["output.y_eval"]) < EXACT
    logits = network.train()(image)
    assert error(logits, tensors["output.y_train"]) < EXACT
    loss = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    assert error(loss[None], tensors["output.bce_real"]) < EXACT
    loss.backward()
    for name, expected in group(tensors, "grad.weight.").items():
        assert error(network.get_parameter(name).grad, expected) < EXACT, name


def test_a_training_pass_brings_the_singular_vectors_one_iteration_further(official):
    network, tensors = official
    network.eval()(tensors["input.x"])
    assert torch.equal(network.conv1.weight_u, tensors["weight.conv1.weight_u"]), "judging changes nothing"
    network.train()(tensors["input.x"])
    after = group(tensors, "output.after_train.")
    assert len(after) == 16
    for name, expected in after.items():
        assert error(network.get_buffer(name), expected) < EXACT, name


def test_real_and_fake_may_be_judged_before_either_gradient(official):
    network, tensors = official
    first = network.train()(tensors["input.x"]).mean()
    second = network(tensors["input.x"].flip(-1)).mean()
    (first + second).backward()
    assert torch.isfinite(network.conv4.weight_orig.grad).all()


def test_the_spectral_norm_becomes_one():
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 4).train()
    for _ in range(200):
        conv(torch.rand(1, 3, 5, 5))
    conv.eval()
    pulse = torch.eye(27).unflatten(1, (3, 3, 3))  # as images of one window each, the matrix row by row
    matrix = conv(pulse)[:, :, 1, 1].T
    torch.testing.assert_close(torch.linalg.matrix_norm(matrix, 2), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_the_official_manifest_fits():
    with torch.device("meta"):
        network = UNetDiscriminatorSN()
    network.load_state_dict(on_meta(folder("checkpoints") / "manifests" / "hat-UNetDiscriminatorSN.keys.json"))
    assert sum(p.numel() for p in network.parameters()) == 4_376_897


@pytest.mark.parametrize("skip", [True, False])
def test_any_size_from_eight_pixels_is_judged_pixel_by_pixel(skip):
    network = UNetDiscriminatorSN(1, 2, skip_connection=skip)
    assert network(torch.rand(2, 1, 13, 9)).shape == (2, 1, 13, 9)
    with pytest.raises(ValueError, match=r"at least 8x8, got \(1, 1, 7, 9\)"):
        network(torch.rand(1, 1, 7, 9))
