import math

import pytest
import torch
from safetensors.torch import save_file

from zoo.errors import UserError
from zoo.evaluate.protocols import Judge, MatlabProtocol, paper_figure, protocol_of, recorded
from zoo.metrics.lpips import LPIPS
from zoo.metrics.psnr_ssim import Protocol


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_matlab_protocol_rounds_luma():
    gt = torch.zeros(3, 12, 12, dtype=torch.uint8)
    restored = gt.clone()
    restored[2] = 4  # moves luma by 0.39 of a level, which rounding hides
    assert math.isinf(MatlabProtocol(0, y_channel=True).psnr(restored, gt))
    assert Protocol(0, y_channel=True).psnr(restored, gt) < 70
    gray = torch.full((1, 12, 12), 7, dtype=torch.uint8)
    assert MatlabProtocol(0).psnr(gray / 255, gray) == math.inf


def test_histoformer_protocol_is_what_its_script_computes():
    metrics = pytest.importorskip("skimage.metrics")
    restored, gt = (noise(3, 30, 26, seed=n).mul(255).round() / 255 for n in (0, 1))
    restored = (0.9 * gt + 0.1 * restored).mul(255).round() / 255
    weights = torch.tensor([24.966, 128.553, 65.481], dtype=torch.float64)  # of red, green, blue: cv2 reads BGR
    lumas = [(torch.einsum("chw,c->hw", x.double(), weights) + 16).div(255).numpy() for x in (restored, gt)]
    protocol = protocol_of("histoformer", 1)
    assert protocol.psnr(restored, gt) == pytest.approx(metrics.peak_signal_noise_ratio(*lumas, data_range=1), abs=1e-5)
    expected = metrics.structural_similarity(*lumas, win_size=11, data_range=1)
    assert protocol.ssim(restored, gt) == pytest.approx(expected, abs=1e-7)
    assert abs(protocol.psnr(restored, gt) - Protocol(y_channel=True).psnr(restored, gt)) > 0.01
    assert protocol.psnr(gt, gt) == math.inf
    with pytest.raises(UserError, match="11 pixels a side"):
        protocol.ssim(gt[:, :9], gt[:, :9])


@pytest.mark.parametrize(
    ("name", "upscale", "label", "other"),
    [
        ("basicsr", 4, "PSNR-Y, crop 4, uint8", "PSNR-RGB, crop 4, uint8"),
        ("basicsr", 1, "PSNR-RGB, crop 0, uint8", "PSNR-Y, crop 0, uint8"),
        ("rgb", 2, "PSNR-RGB, crop 2, uint8", "PSNR-Y, crop 2, uint8"),
        ("matlab", 3, "PSNR-Y rounded, crop 3, uint8", "PSNR-RGB, crop 3, uint8"),
        ("histoformer", 1, "PSNR-Y of BGR, crop 0, uint8", "PSNR-RGB, crop 0, uint8"),
    ],
)
def test_the_other_colour_space_has_the_same_border(name, upscale, label, other):
    protocol = protocol_of(name, upscale)
    assert str(protocol) == label
    judge = Judge(protocol)
    assert other in judge.labels.values()
    measured = judge("a", noise(3, 40, 40), noise(3, 40, 40, seed=1))
    key = "psnr_y" if "-Y" in other else "psnr_rgb"
    expected = Protocol(protocol.crop_border, y_channel="-Y" in other)
    assert measured.also[key] == expected.psnr(noise(3, 40, 40), noise(3, 40, 40, seed=1))


def test_lpips_without_its_file_says_which_is_missing(tmp_path):
    judge = Judge(Protocol(2), lpips_file=tmp_path / "alex.pth")
    assert judge.missing == {"lpips": f"file {tmp_path / 'alex.pth'} not found"}
    assert judge("a", noise(3, 40, 40), noise(3, 40, 40)).also["lpips"] is None


def test_lpips_from_a_file_is_measured_within_the_border(tmp_path):
    torch.manual_seed(0)
    save_file(LPIPS("alex").state_dict(), tmp_path / "alex.safetensors")
    judge = Judge(Protocol(4), lpips_file=tmp_path / "alex.safetensors")
    assert judge.labels["lpips"] == "LPIPS (alex, version 0.1), RGB, crop 4, uint8"
    gt = noise(3, 48, 48)
    frame = gt.clone()
    frame[:, :4] = 0
    assert judge("a", frame, gt).also["lpips"] == 0
    assert judge("a", noise(3, 48, 48, seed=1), gt).also["lpips"] != 0
    assert judge("a", noise(3, 38, 38), noise(3, 38, 38)).also["lpips"] is None, "30 pixels are too few"
    (tmp_path / "damaged.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        Judge(Protocol(), lpips_file=tmp_path / "damaged.pth")


def test_papers_figures_are_found_by_set_and_protocol():
    sets = ("Set5", "Set14", "BSD100", "Urban100", "Manga109")
    figures = recorded("hat-x4")
    assert figures[0] == "paper: Set5 PSNR-Y, crop 4, uint8 33.04 dB"
    assert [line.split()[1] for line in figures] == list(sets)
    assert recorded("w.safetensors") == []
    assert paper_figure("hat-x4", "/data/benchmark/set5", "PSNR-Y, crop 4, uint8") == "33.04 dB"
    for wrong in (("hat-x4", "DIV2K", "PSNR-Y, crop 4, uint8"), ("hat-x4", "Set5", "PSNR-RGB, crop 4, uint8")):
        assert paper_figure(*wrong) is None
    assert paper_figure(None, "Set5", "PSNR-Y, crop 4, uint8") is None
