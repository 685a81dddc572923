from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from zoo.data.imresize import enlarged, imresize

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sr_protocol.safetensors")
SCALES = {"1div2": 1 / 2, "1div3": 1 / 3, "1div4": 1 / 4, "2": 2, "3": 3, "4": 4, "0.37": 0.37}
CASES = [key for key in GOLDEN if ".scale_" in key]
FLOAT = 1e-5  # the reference works in float32
OFF_BY_ONE = 1e-4  # share of 8-bit values that the reference's float32 may round the other way


def case(key):
    name, *options = key.split("scale_")[1].split("_")
    return GOLDEN[key.replace("output", "input").split(".scale_")[0] + ".img"], SCALES[name], options


@pytest.mark.parametrize("key", CASES)
def test_equals_the_reference(key):
    image, scale, options = case(key)
    chw = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    y = imresize(chw, scale, antialias="noaa" not in options)
    actual = y.permute(1, 2, 0).numpy()
    assert actual.shape == GOLDEN[key].shape
    if "u8" in options:
        levels = np.rint(actual.clip(0, 1) * 255).astype(int)
        difference = np.abs(levels - GOLDEN[key])
        assert difference.max() <= 1
        assert (difference > 0).mean() < OFF_BY_ONE
    else:
        assert np.abs(actual - GOLDEN[key]).max() <= FLOAT
        torch.testing.assert_close(imresize(chw[None].double(), scale, antialias="noaa" not in options)[0].float(), y)


def dense(size, scale, antialias=True):
    """The definition, entry by entry in Python."""
    out = int(np.ceil(size * scale - 1e-9))
    shrink = scale if antialias and scale < 1 else 1.0
    matrix = np.zeros((out, size))
    for j in range(1, out + 1):
        u = j / scale + 0.5 * (1 - 1 / scale)
        left = np.floor(u - 2 / shrink)
        for i in np.arange(left, left + np.ceil(4 / shrink) + 2):
            t = abs(shrink * (u - i))
            k = 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t <= 2 else 0.0
            place = int(i - 1) % (2 * size)
            matrix[j - 1, min(place, 2 * size - 1 - place)] += k
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("h", "w", "scale"), [(70, 41, 1 / 3), (3, 100, 1 / 4), (1, 1, 2), (30, 9, 0.1), (5, 2, 1 / 8)]
)
def test_equals_the_definition_for_tiny_and_blocked_sizes(h, w, scale):
    x = np.random.default_rng(0).random((h, w))
    expected = dense(h, scale) @ x @ dense(w, scale).T
    np.testing.assert_allclose(imresize(x, scale), expected, atol=1e-12)
    np.testing.assert_allclose(imresize(np.dstack([x, x]), scale)[..., 1], expected, atol=1e-12)


def test_bytes_are_rounded_once_at_the_end():
    image = GOLDEN["input.resize1.img"]
    expected = np.rint(imresize(image.astype(float), 1 / 3).clip(0, 255))
    small = imresize(image, 1 / 3)
    assert small.dtype == np.uint8
    np.testing.assert_array_equal(small, expected)


def test_gradients_and_low_precision():
    x = torch.rand(1, 1, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: imresize(t, 0.5), x)
    half = imresize(x.detach().bfloat16(), 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), imresize(x.detach().bfloat16().double(), 2), atol=4e-3, rtol=1e-2)


def test_weights_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        imresize(torch.rand(1, 11, 13), 0.7)
    x = torch.rand(1, 11, 13, requires_grad=True)
    imresize(x, 0.7).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("shape", [(3, 9, 7), (2, 1, 9, 7)])
def test_the_baseline_is_computed_in_float64_and_is_the_input_where_sizes_are_equal(shape):
    lq = torch.rand(shape)
    assert enlarged(lq, 1) is lq
    assert torch.equal(enlarged(lq, 3), imresize(lq.double(), 3).float())
    assert not torch.equal(enlarged(lq, 3), imresize(lq, 3))


@pytest.mark.parametrize(
    ("x", "scale", "message"),
    [
        (torch.zeros(3, 4), 2, r"got torch.float32 \(3, 4\)"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), 2, "torch.uint8"),
        (np.zeros((4, 0)), 2, r"\(4, 0\)"),
        (np.zeros((4, 4)), 0, "scale must be positive, got 0"),
    ],
)
def test_impossible_inputs_are_named(x, scale, message):
    with pytest.raises(ValueError, match=message):
        imresize(x, scale)
