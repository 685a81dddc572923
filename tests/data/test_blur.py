from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from zoo.data.blur import filter2d, gaussian_kernel, sinc_kernel, usm

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "sr_protocol.safetensors")
IMAGE = GOLDEN["input.degrade.img"].permute(2, 0, 1)[None].float() / 255
ANISO = {"sigma_x": 2.1, "sigma_y": 0.7, "theta": 0.6}
KERNELS = {
    "iso": {"sigma_x": 2.1},
    "aniso": ANISO,
    "generalized_iso": {"sigma_x": 2.1, "beta": 0.7},
    "generalized_aniso": ANISO | {"beta": 0.7},
    "plateau_iso": {"sigma_x": 2.1, "beta": 1.6, "plateau": True},
    "plateau_aniso": ANISO | {"beta": 1.6, "plateau": True},
}
KERNEL, FILTERED = 1e-8, 1e-5


@pytest.mark.parametrize("kind", KERNELS)
def test_kernels_equal_the_reference(kind):
    torch.testing.assert_close(
        gaussian_kernel(15, **KERNELS[kind]), GOLDEN[f"output.kernel.{kind}"], atol=KERNEL, rtol=0
    )


def test_sinc_kernel_equals_the_reference():
    torch.testing.assert_close(sinc_kernel(15, 1.3, pad_to=21), GOLDEN["output.kernel.sinc"], atol=KERNEL, rtol=0)
    assert sinc_kernel(7, 3.0).shape == (7, 7)


def test_one_kernel_for_all_or_one_a_sample():
    aniso, sinc = GOLDEN["output.kernel.aniso"], GOLDEN["output.kernel.sinc"]
    torch.testing.assert_close(filter2d(IMAGE, aniso), GOLDEN["output.filter2d_aniso"], atol=FILTERED, rtol=0)
    batch, kernels = torch.cat([IMAGE, IMAGE.flip(-1)]), torch.stack([F.pad(aniso, (3, 3, 3, 3)), sinc])
    expected = GOLDEN["output.filter2d_batch_aniso_sinc"]
    torch.testing.assert_close(filter2d(batch, kernels), expected, atol=FILTERED, rtol=0)


def test_unsharp_masking_equals_the_reference():
    torch.testing.assert_close(usm(IMAGE), GOLDEN["output.usm_w0.5_r50_t10"], atol=FILTERED, rtol=0)


def test_impossible_kernels_are_named():
    with pytest.raises(ValueError, match="size must be odd"):
        gaussian_kernel(4, 1.0)
    with pytest.raises(ValueError, match="cutoff in"):
        sinc_kernel(7, 4.0)
    with pytest.raises(ValueError, match=r"\(k, k\) or \(1, k, k\)"):
        filter2d(IMAGE, torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match="larger than 10, got 8x8"):
        filter2d(IMAGE[..., :8, :8], torch.ones(21, 21))
