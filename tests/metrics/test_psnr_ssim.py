import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from zoo.errors import UserError
from zoo.metrics.psnr_ssim import Protocol, psnr, psnr_b, rgb_to_y, ssim

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sr_protocol.safetensors")
DB, SSIM = 1e-5, 1e-7  # of the reference implementation, which computes Y in float32
PAIRS = range(6)


def pair(n):
    return [GOLDEN[f"input.pair{n}.{key}"].permute(2, 0, 1).float() / 255 for key in "ab"]


def cases(key):
    for n in PAIRS:
        for crop, y, *expected in GOLDEN.get(f"output.pair{n}.{key}", torch.empty(0)).tolist():
            yield pytest.param(n, {"crop_border": int(crop), "y_channel": bool(y)}, *expected, id=f"{n}-{crop:g}-{y:g}")


@pytest.mark.parametrize(("n", "protocol", "expected_psnr", "expected_ssim"), list(cases("crop_y_psnr_ssim")))
def test_eight_bit_metrics_equal_the_reference(n, protocol, expected_psnr, expected_ssim):
    assert psnr(*pair(n), **protocol) == pytest.approx(expected_psnr, abs=DB, rel=0)
    assert ssim(*pair(n), **protocol) == pytest.approx(expected_ssim, abs=SSIM, rel=0)


@pytest.mark.parametrize(("n", "protocol", "expected_psnr", "expected_ssim"), list(cases("pt_crop_y_psnr_ssim")))
def test_unrounded_metrics_equal_the_reference_tensor_variant(n, protocol, expected_psnr, expected_ssim):
    assert psnr(*pair(n), **protocol, quantize=False) == pytest.approx(expected_psnr, abs=DB, rel=0)
    assert ssim(*pair(n), **protocol, quantize=False) == pytest.approx(expected_ssim, abs=SSIM, rel=0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_luma_is_the_unrounded_studio_range_one(n):
    torch.testing.assert_close(rgb_to_y(pair(n)[0])[0], GOLDEN[f"output.pair{n}.a_y"], atol=4e-5, rtol=0)


def test_rounding_clamps_and_sends_ties_to_the_even_level():
    x, levels = GOLDEN["input.float_chw_rgb"], GOLDEN["output.uint8_hwc_rgb"].permute(2, 0, 1)
    assert psnr(x, levels) == math.inf
    half = torch.full((1, 4, 4), 0.5 / 255)
    assert psnr(half, torch.zeros(1, 4, 4)) == math.inf  # 0.5 rounds to 0
    assert psnr(half, torch.zeros(1, 4, 4), quantize=False) < 60


def test_arrays_bytes_and_batches_mean_the_same():
    a, b = pair(0)
    expected = psnr(a, b, y_channel=True)
    assert psnr(a.numpy(), b.numpy(), y_channel=True) == expected
    assert (
        psnr((a * 255).round().to(torch.uint8), (b * 255).round().to(torch.uint8).numpy(), y_channel=True) == expected
    )
    both = torch.stack([a, b]), torch.stack([b, b * 0.5])
    assert psnr(*both) == pytest.approx((psnr(a, b) + psnr(b, b * 0.5)) / 2)
    assert ssim(*both) == pytest.approx((ssim(a, b) + ssim(b, b * 0.5)) / 2)


def test_psnr_b_counts_block_edges_of_the_output_only():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0.2, 0.8, 64).expand(1, 48, 64).contiguous()
    noisy = (smooth + 0.02 * torch.randn(1, 48, 64, generator=generator)).clamp(0, 1)
    blocky = smooth + 0.05 * ((torch.arange(64) // 8) % 2)
    assert psnr_b(blocky, smooth) < psnr(blocky, smooth) - 1
    assert psnr_b(noisy, blocky) == pytest.approx(psnr(noisy, blocky), abs=0.2)  # no edge where blocks meet
    # The definition, in numpy.
    r, g = (np.rint(x[0].numpy() * np.float32(255)).astype(float) for x in (blocky, smooth))
    horizontal, vertical = (r[:, 1:] - r[:, :-1]) ** 2, (r[1:] - r[:-1]) ** 2
    at = np.arange(63) % 8 == 7
    across = np.concatenate([horizontal[:, at].ravel(), vertical[at[:47]].ravel()]).mean()
    inside = np.concatenate([horizontal[:, ~at].ravel(), vertical[~at[:47]].ravel()]).mean()
    error = ((r - g) ** 2).mean() + 3 / math.log2(48) * (across - inside)
    assert psnr_b(blocky, smooth) == pytest.approx(10 * math.log10(255**2 / error), abs=1e-9)


def test_protocol_says_what_it_does_and_does_it():
    protocol = Protocol(crop_border=2, y_channel=True)
    assert str(protocol) == "PSNR-Y, crop 2, uint8"
    assert Protocol(quantize=False).label("SSIM") == "SSIM-RGB, crop 0, float"
    a, b = pair(1)
    assert protocol.psnr(a, b) == psnr(a, b, crop_border=2, y_channel=True) != psnr(a, b)
    assert protocol.ssim(a, b) == ssim(a, b, crop_border=2, y_channel=True)
    assert protocol.psnr_b(a, b) == psnr_b(a, b, crop_border=2, y_channel=True)


def test_impossible_inputs_are_named():
    small, wrong = torch.zeros(3, 16, 30), torch.zeros(3, 16, 31)
    with pytest.raises(ValueError, match=r"\(3, 16, 30\) and \(3, 16, 31\)"):
        psnr(small, wrong)
    with pytest.raises(UserError, match=r"24x10 after cropping has no SSIM.*leave it out"):
        ssim(small, small, crop_border=3)
    with pytest.raises(ValueError, match="must leave a pixel of 16x30, got 8"):
        psnr(small, small, crop_border=8)
    with pytest.raises(UserError, match="no block edge"):
        psnr_b(small, small, crop_border=4)
