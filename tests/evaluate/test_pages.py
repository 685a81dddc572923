import re

import numpy as np
import pytest

from tests.test_report import balanced
from zoo.errors import UserError
from zoo.evaluate.pages import page, summary
from zoo.evaluate.restorers import Row, Scores, Views
from zoo.metrics.psnr_ssim import Protocol

LABELS = {"psnr_rgb": "PSNR-RGB, crop 2, uint8", "lpips": "LPIPS, RGB, crop 2, uint8"}
MISSING = {"lpips": "file /a/alex.pth not found"}


def scores(model, psnr, paper=None):
    also = {"psnr_rgb": (psnr - 1, 28.0), "lpips": (None, None)}
    rows = [Row(name, 60, 40, psnr, 0.9, 30.0, None, 0.5, also) for name in ("a.png", "b.png")]
    return Scores(model, "Set5", 2, "bicubic", Protocol(2, y_channel=True), rows, LABELS, MISSING, paper)


def views(side=40):
    rng = np.random.default_rng(0)
    gt = rng.integers(0, 256, (side, 60, 3), dtype=np.uint8)
    return Views(gt[::2, ::2], {"bicubic, 30.00 dB": gt / np.float32(255), "m, 31.00 dB": gt}, gt, (side - 9, 0, 8))


def test_summary_has_a_row_per_model_and_the_papers_figure_beside_ours():
    first, mine, other = summary([scores("m", 31.0, "33.04 dB"), scores("n", 32.0)])
    assert (first[""], first["PSNR-Y, crop 2, uint8"], first["gain"]) == ("bicubic", "30.00 dB", "")
    assert (mine["PSNR-Y, crop 2, uint8"], mine["paper"], mine["gain"]) == ("31.00 dB", "33.04 dB", "+1.00 dB")
    assert (first["SSIM-Y, crop 2, uint8"], mine["SSIM-Y, crop 2, uint8"]) == ("n/a", "0.9000")
    assert (first[LABELS["psnr_rgb"]], mine[LABELS["psnr_rgb"]]) == ("28.00 dB", "30.00 dB")
    assert (mine[LABELS["lpips"]], other["paper"]) == ("n/a", "")
    assert "paper" not in summary([scores("bicubic", 30.0)])[0]


def test_page_holds_tables_sliders_and_how_it_was_measured():
    text = page(
        [[scores("m", 31.0, "33.04 dB")]], [{"a.png": views(), "b.png": views(1700)}], {"m: weights": "sha256 0"}
    )
    balanced(text)
    assert "LPIPS, RGB, crop 2, uint8: n/a (file /a/alex.pth not found)" in text
    assert text.count('class="slider"') == 4, "bicubic against m and m against ground truth, of two images"
    assert "33.04 dB" in text
    assert "sha256 0" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text), "nothing is fetched"
    assert "url(" not in text


def test_pictures_wider_than_the_page_needs_are_cut_around_the_telling_square():
    text = page([[scores("m", 31.0)]], [{"b.png": views(1700)}], {})
    assert len(text) < len(page([[scores("m", 31.0)]], [{"b.png": views(1600)}], {})) * 1.05


def test_two_models_are_set_against_each_other():
    two = views()
    two.restored["n, 32.00 dB"] = two.gt
    text = page([[scores("m", 31.0), scores("n", 32.0)]], [{"a.png": two}], {})
    assert "a.png: m, 31.00 dB</span><span>n, 32.00 dB" in text


def test_no_scores_are_refused():
    with pytest.raises(UserError, match="no scores were given"):
        page([], [], {})
