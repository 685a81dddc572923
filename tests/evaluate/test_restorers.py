import math
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo import shipped
from zoo.data.degradations import Bicubic, Jpeg, Noise
from zoo.data.images import to_tensor
from zoo.data.imresize import imresize
from zoo.data.pairs import PairedFolder
from zoo.data.photos import photos
from zoo.data.weather import Rain, Snow
from zoo.errors import UserError
from zoo.evaluate.restorers import Row, Scores, Trial, compare, evaluate, steps_of, telling_images
from zoo.media import write_image
from zoo.metrics.psnr_ssim import Protocol, psnr
from zoo.models import create

CONV = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    return create(CONV)


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", (40, 33)), ("b.png", (32, 48))):
        smooth = np.kron(RNG.random((size[0] // 8 + 1, size[1] // 8 + 1, 3)), np.ones((8, 8, 1)))
        write_image(tmp_path / "gt" / name, smooth[: size[0], : size[1]])
    return str(tmp_path / "gt")


def test_bicubic_on_the_demo_photo_is_the_hand_computed_number():
    gt = torch.from_numpy(photos("demo")[0][1]).permute(2, 0, 1)[:, :, :450]
    enlarged = imresize(Bicubic(2).fixed(gt).double(), 2.0).float()
    scores = evaluate("bicubic", "demo", upscale=2)
    assert scores.psnr == pytest.approx(psnr(enlarged, gt, crop_border=2, y_channel=True), abs=1e-6)
    assert scores.gain == 0
    assert str(scores.protocol) == "PSNR-Y, crop 2, uint8"
    assert (scores.rows[0].width, scores.rows[0].height) == (450, 300)


def test_rows_hold_model_and_bicubic_of_the_same_input(conv, folder):
    scores = evaluate(conv, folder)
    assert [row.image for row in scores.rows] == ["a.png", "b.png"]
    assert scores.psnr == pytest.approx(np.mean([row.psnr for row in scores.rows]))
    assert scores.gain == pytest.approx(scores.psnr - scores.bicubic_psnr)
    both = compare(["bicubic", conv], folder)
    assert [s.model for s in both] == ["bicubic", "PlainConv"]
    assert both[1].psnr == pytest.approx(scores.psnr)
    assert both[0].psnr == pytest.approx(scores.bicubic_psnr)
    assert all(0 < row.ssim < 1 for s in both for row in s.rows)


def test_jpeg_and_noise_make_the_input_worse(conv, folder):
    clean = evaluate("bicubic", folder, upscale=2)
    worse = evaluate("bicubic", folder, upscale=2, degradation="bicubic+noise25+jpeg30")
    assert worse.degradation == "bicubic+noise25+jpeg30"
    assert worse.psnr < clean.psnr - 1
    denoise = evaluate("bicubic", folder, upscale=1, degradation="bicubic+noise25")
    assert denoise.degradation == "noise25"
    assert str(denoise.protocol) == "PSNR-RGB, crop 0, uint8"
    assert 19 < denoise.psnr < 22  # 20.17 dB before clamping


def test_a_file_damaged_later_is_left_out_and_no_other_counts_twice(conv, folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(PairedFolder.__init__.__kwdefaults__, "keep", 0)  # nothing stays in memory
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    [_, expected] = evaluate(conv, folder).rows
    trial = Trial([conv, "bicubic"], folder)
    Path(folder, "a.png").write_bytes(Path(folder, "a.png").read_bytes()[:200])
    scores = trial.run()
    assert [[row.image for row in one.rows] for one in scores] == [["b.png"], ["b.png"]]
    assert scores[0].psnr == expected.psnr
    (worst,) = telling_images(scores, 5)
    assert trial.figure(worst, trial.views(worst, scores)).size
    assert caplog.text.count("a.png is left out from now on, 1 of 2") == 1
    Path(folder, "b.png").unlink()
    with pytest.raises(UserError, match="none of its 2 images can be read"):
        trial.run()


def test_given_lq_files_are_used(tmp_path, conv):
    write_image(tmp_path / "gt/a.png", RNG.random((24, 24, 3)))
    write_image(tmp_path / "lq/a.png", np.zeros((12, 12, 3)))
    scores = evaluate("bicubic", str(tmp_path), upscale=2)
    assert scores.degradation == "lq as given"
    assert scores.psnr < 8  # against black


def test_protocols_differ_and_name_themselves(folder):
    values = {p: evaluate("bicubic", folder, upscale=2, protocol=p) for p in ("basicsr", "rgb", "matlab")}
    assert str(values["rgb"].protocol) == "PSNR-RGB, crop 2, uint8"
    assert values["matlab"].protocol.label("SSIM") == "SSIM-Y rounded, crop 2, uint8"
    assert 0 < abs(values["basicsr"].psnr - values["matlab"].psnr) < 0.1
    assert abs(values["basicsr"].ssim - values["matlab"].ssim) < 0.01
    assert values["rgb"].psnr < values["basicsr"].psnr


def test_gray_networks_are_measured_on_gray(folder):
    scores = evaluate(create(CONV | {"in_chans": 1}), folder)
    assert len(scores.rows) == 2
    assert list(scores.labels) == ["lpips"], "gray images have one colour space"


def test_both_colour_spaces_stand_beside_each_other(conv, folder):
    (main,), (other,) = (compare([conv], folder, protocol=name) for name in ("basicsr", "rgb"))
    assert main.labels["psnr_rgb"] == str(other.protocol)
    assert other.labels["ssim_y"] == main.protocol.label("SSIM")
    for one, two in zip(main.rows, other.rows, strict=True):
        assert one.also["psnr_rgb"] == (two.psnr, two.bicubic_psnr)
        assert two.also["ssim_y"] == (one.ssim, one.bicubic_ssim)
    assert main.also("psnr_rgb") == pytest.approx((other.psnr, other.bicubic_psnr))


def test_image_too_small_for_ssim_has_none(tmp_path, conv):
    write_image(tmp_path / "tiny.png", RNG.random((12, 12, 3)))
    scores = evaluate(conv, str(tmp_path))
    assert scores.rows[0].ssim is None
    assert scores.ssim is None
    write_image(tmp_path / "tinier.png", RNG.random((4, 40, 3)))
    with pytest.raises(UserError, match=r"tinier\.png: nothing is left of 40x4 after cropping"):
        evaluate(conv, str(tmp_path))


def test_mistakes_are_told_before_any_work(conv, folder):
    for options, words in (
        ({"degradation": "jpeg"}, "'jpeg' is none of jpegQ, noiseS"),
        ({"degradation": "bicubic+blur3"}, "'blur3' is none of jpegQ, noiseS"),
        ({"degradation": "bicubic+jpeg75.9"}, "'jpeg75.9' is none of jpegQ, noiseS"),
        ({"protocol": "matlap"}, "Did you mean 'matlab'"),
        ({"upscale": 3}, "models and --upscale disagree"),
    ):
        with pytest.raises(UserError, match=words):
            Trial([conv], folder, **options)
    with pytest.raises(UserError, match="does not tell the upscale"):
        Trial(["bicubic"], folder)
    assert steps_of("bicubic+noise2.5+jpeg75") == steps_of("noise2.5+jpeg75") == [Noise(2.5), Jpeg(75)]
    assert steps_of("rain+snow22") == [Rain(), Snow(22.0)]


def test_weather_is_the_same_in_every_evaluation_and_as_heavy_as_asked_for(folder):
    network = create({"family": "plain-conv", "embed_dim": 2, "depth": 1, "num_feat": 2, "upscale": 1})
    first, second = (evaluate(network, folder, degradation="rain21") for _ in range(2))
    assert [row.psnr for row in first.rows] == [row.psnr for row in second.rows]
    assert first.degradation == "rain21"
    trial = Trial([network], folder, degradation="rain21")
    inputs = [trial.degraded(pair) for pair in trial.pairs]
    errors = [float((lq - to_tensor(pair.gt)).square().mean()) for lq, pair in zip(inputs, trial.pairs, strict=True)]
    assert [-10 * math.log10(error) for error in errors] == pytest.approx([21.0] * len(errors), abs=0.1)


def test_figure_shows_every_model_and_progress_ends_at_the_total(conv, folder):
    trial = Trial([conv, "bicubic"], folder)
    seen = []
    scores = trial.run(lambda done, total, name: seen.append((done, total, name)))
    assert seen[-1] == (3, 4, "b.png")  # the last network is done; bicubic, the last model, reports nothing
    (worst,) = telling_images(scores)
    figure = trial.figure(worst, trial.views(worst, scores))
    assert figure.dtype == np.uint8
    assert figure.shape[1] > 5 * 400  # input, bicubic, model, ground truth, error


def test_telling_images_gain_least_or_disagree_most():
    def scores(*gains):
        rows = [Row(str(i), 9, 9, 30 + g, 1, 30, 1, 0) for i, g in enumerate(gains)]
        return Scores("m", "d", 2, "bicubic", Protocol(), rows)

    assert telling_images([scores(1, 0.2, 3)], 2) == ["1", "0"]
    assert telling_images([scores(1, 0.2, 3), scores(1.5, 0.1, 3)], 9) == ["0", "1", "2"]


def test_perfect_rows_gain_nothing_instead_of_nan():
    assert Row("a", 9, 9, math.inf, 1, math.inf, 1, 0).gain == 0


MEASURED = [
    pytest.param(name, degradation, id=f"{name} {degradation}")
    for name, row in shipped.index().items()
    for degradation in row.get("per_image", ())
]
GAINS = {"hat-tiny-x2": 1.6, "hat-tiny-x4": 0.8, "plain-conv-tiny-x2": 1.6}  # dB over the input, without JPEG


@pytest.mark.parametrize(("name", "degradation"), MEASURED)
def test_shipped_weights_score_what_the_index_says(name, degradation):
    scores = evaluate(name, degradation=degradation)
    told = shipped.index()[name]["per_image"][degradation]
    assert {row.image for row in scores.rows} == set(told)
    for row in scores.rows:
        assert row.psnr == pytest.approx(told[row.image]["psnr"], abs=0.01)
    degraded_twice = degradation.endswith("jpeg75")
    assert scores.gain >= (0 if degraded_twice else GAINS[name])
    assert degraded_twice or min(row.gain for row in scores.rows) > 0


@pytest.mark.parametrize("name", [name for name in GAINS if name != "plain-conv-tiny-x2"])
def test_shipped_weights_score_the_same_in_tiles(name):
    whole, tiled = (evaluate(name, "demo", tile=tile) for tile in (None, 64))
    for row, other in zip(whole.rows, tiled.rows, strict=True):
        assert other.psnr == pytest.approx(row.psnr, abs=0.01)
