import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from zoo.data.jpeg import diffjpeg, jpeg
from zoo.data.photos import load

FILE = Path(__file__).parents[1] / "golden" / "sr_protocol.safetensors"
GOLDEN = load_file(FILE)
IMAGE = GOLDEN["input.degrade.img"].permute(2, 0, 1).float() / 255


def test_imitation_equals_the_reference():
    with safe_open(FILE, "pt") as file:
        quality = torch.tensor([float(q) for q in file.metadata()["jpeg_quality"].strip("[]").split(",")])
    before = quality.clone()
    error = (diffjpeg(torch.stack([IMAGE, IMAGE.flip(-1)]), quality) - GOLDEN["output.diffjpeg"]).abs()
    assert (error <= 1e-4).float().mean() >= 0.999  # a coefficient on a tie may flip its block
    torch.testing.assert_close(quality, before)  # the original overwrites it


def test_imitation_comes_near_the_real_encoder_and_passes_gradients():
    photo = torch.from_numpy(load("demo")[0].pixels[:96, :128].copy()).permute(2, 0, 1).float() / 255
    x = photo[None].clone().requires_grad_()
    imitated, real = diffjpeg(x, 80), jpeg(photo, 80)
    assert (imitated[0].detach() - real).abs().mean() < 0.8 * (photo - real).abs().mean()
    imitated.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert diffjpeg(IMAGE[None, :, :13, :9], 50).shape == (1, 3, 13, 9)
    plain = IMAGE[None, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(diffjpeg(plain, 100), plain, atol=1e-3, rtol=0)  # gray: no chroma to lose
    torch.testing.assert_close(diffjpeg(plain[:, :1], 30), diffjpeg(plain, 30)[:, :1])


@pytest.mark.parametrize("channels", [1, 3])
def test_real_encoder_is_that_of_a_file(channels, tmp_path):
    x = IMAGE[:channels]
    pixels = (x * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=30)
    expected = (
        torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).reshape(*x.shape[1:], channels).permute(2, 0, 1)
    )
    torch.testing.assert_close(jpeg(x, 30) * 255, expected.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(jpeg(torch.stack([x, x]), 30)[1], jpeg(x, 30))
    assert (jpeg(x, 10) - x).square().mean() > (jpeg(x, 90) - x).square().mean()


def test_decoded_values_are_bytes_of_the_stream():
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 77).save(buffer, "JPEG", quality=95)
    assert (jpeg(torch.full((1, 8, 8), 77 / 255), 95) * 255).round().unique().tolist() == [77.0]


def test_impossible_inputs_are_named():
    with pytest.raises(ValueError, match=r"1 or 3 channels, got \(2, 8, 8\)"):
        jpeg(torch.zeros(2, 8, 8), 50)
    with pytest.raises(ValueError, match=r"\(b, 1, h, w\), got \(3, 8, 8\)"):
        diffjpeg(torch.zeros(3, 8, 8), 50)
