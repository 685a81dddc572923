import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.data.degradations import Bicubic
from zoo.data.photos import photos
from zoo.errors import UserError
from zoo.media import Picture
from zoo.metrics.psnr_ssim import Protocol
from zoo.models import create
from zoo.models.weights import write_weights
from zoo.pipelines import restoring
from zoo.pipelines.restoring import facts, prepare, restore, restore_picture, restore_video

CONV = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4, "upscale": 2}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    return create(CONV)


@pytest.fixture(scope="module")
def gray_conv():
    torch.manual_seed(0)
    return create(CONV | {"in_chans": 1})


def ramp(h, w, c):
    return RNG.random((h, w, c)).astype(np.float32)


def test_the_public_name_is_this_function():
    assert zoo.restore is restore


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "I;16"])
def test_pillow_image_keeps_gray_and_transparency(conv, mode):
    image = Image.fromarray((ramp(6, 9, 3) * 255).astype(np.uint8))
    image = (
        Image.fromarray((ramp(6, 9, 1)[..., 0] * 65535).astype(np.uint16)) if mode == "I;16" else image.convert(mode)
    )
    out = restore(image, conv)
    assert out.size == (18, 12)
    assert out.mode == {"P": "RGB", "1": "L", "CMYK": "RGB"}.get(mode, mode)


def test_tensor_comes_back_as_a_tensor_in_range(conv):
    image = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    out = restore(image, conv)
    assert out.shape == (2, 3, 10, 14)
    assert out.dtype == torch.float64
    assert out.min() >= 0
    assert out.max() <= 1
    assert restore(image[:, :1], conv).shape == (2, 1, 10, 14)


def test_gray_through_a_colour_network_is_the_mean_of_its_channels(conv):
    gray = torch.rand(1, 1, 8, 8) * 0.5 + 0.25
    with torch.no_grad():
        expected = conv(gray.repeat(1, 3, 1, 1)).mean(1, keepdim=True).clamp(0, 1)
    torch.testing.assert_close(restore(gray, conv), expected)


def test_colour_through_a_gray_network_goes_channel_by_channel(gray_conv):
    image = torch.rand(2, 3, 8, 6)
    with torch.no_grad():
        expected = torch.cat([gray_conv(image[:, i : i + 1]) for i in range(3)], 1).clamp(0, 1)
    torch.testing.assert_close(restore(image, gray_conv), expected)


def test_hard_alpha_stays_hard_and_soft_alpha_stays_smooth(conv):
    hard = np.zeros((8, 8), np.float32)
    hard[2:6, 2:6] = 1
    out = restore_picture(conv, Picture(ramp(8, 8, 3), hard))
    assert set(np.unique(out.alpha)) == {0, 1}
    assert out.alpha[4:12, 4:12].mean() > 0.9
    assert out.alpha[:3].max() == 0
    soft = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    out = restore_picture(conv, Picture(ramp(8, 8, 3), soft))
    assert len(np.unique(out.alpha)) > 100
    assert out.alpha.min() >= 0
    assert out.alpha.max() <= 1


@pytest.mark.parametrize("size", [(9, 7), (16, 16), (1, 2)])
def test_hidden_colours_do_not_bleed_into_what_is_seen(conv, size):
    alpha = np.ones(size, np.float32)
    alpha[:, 1:] = 0
    pixels = ramp(*size, 3)
    outs = []
    for hidden in (0.0, 1.0):
        pixels[:, 1:] = hidden
        outs.append(restore_picture(conv, Picture(pixels.copy(), alpha)).pixels)
    np.testing.assert_array_equal(outs[0], outs[1])


def test_filled_surroundings_are_the_colours_nearby():
    image, known = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    known[..., :2], known[..., 6:] = 1, 1
    image[..., :2], image[..., 2:6], image[..., 6:] = 0.2, 9.0, 0.8
    filled = restoring._surroundings(image, known)[0, 0, 0]
    assert filled[:2].tolist() == pytest.approx([0.2, 0.2])
    assert filled[2:6].tolist() == pytest.approx([0.2, 0.2, 0.8, 0.8])


def test_depth_profile_and_text_are_kept(conv):
    info = {"icc_profile": b"profile", "text": {"Title": "x"}}
    out = restore_picture(conv, Picture(ramp(4, 4, 1), None, 16, info))
    assert out.bits == 16
    assert out.info == info
    assert out.pixels.shape == (8, 8, 1)


def test_bfloat16_is_near_float32_and_refused_where_it_fails(conv):
    image = torch.rand(1, 3, 16, 16)
    exact, low = restore(image, conv), restore(image, conv, dtype="bfloat16")
    assert low.dtype == torch.float32
    assert 0 < (exact - low).abs().max() < 0.02
    with pytest.raises(UserError, match="HAT does not work in float16"):
        restore(image, create("hat-tiny-x2"), dtype="float16")


def test_tiles_reach_the_pipeline(conv):
    calls = []
    restore(torch.rand(1, 3, 60, 50), conv, tile=36, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] > 1


def test_weight_file_and_unknown_names(conv, tmp_path):
    path = write_weights(tmp_path / "w.safetensors", conv)
    image = torch.rand(1, 3, 6, 6)
    torch.testing.assert_close(restore(image, path), restore(image, conv))
    assert facts(prepare(path), dtype="float32", tile=None)["zoo:tile"] == "off"
    assert (
        facts(prepare(path), dtype="float32", tile=None)["zoo:weights"] == facts(conv, dtype="x", tile=1)["zoo:weights"]
    )
    with pytest.raises(UserError, match=r"Did you mean .*'hat-tiny-x2'"):
        restore(image, "hat-tiny-x3")


def test_wrong_inputs_are_one_sentence(conv):
    with pytest.raises(UserError, match="takes a Pillow image or a tensor, got str"):
        restore("photo.jpg", conv)
    with pytest.raises(UserError, match=r"1 or 3 channels, got \(1, 4, 5, 5\)"):
        restore(torch.rand(1, 4, 5, 5), conv)
    with pytest.raises(UserError, match=r"device cuda:77: torch sees \d+ CUDA devices"):
        restore(torch.rand(1, 3, 5, 5), conv, device="cuda:77")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_image_with_values_that_are_no_numbers_is_blamed_itself(conv, value):
    image = torch.rand(1, 3, 5, 5)
    image[0, 1, 2, 3] = float(value)
    with pytest.raises(UserError, match="the image holds values that are not numbers; replace them"):
        restore(image, conv)


def test_broken_weights_are_not_written_as_a_black_picture():
    network = create(CONV)
    network.conv_last.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not numbers in float32; its weights are damaged"):
        restore(torch.rand(1, 3, 5, 5), network)
    with pytest.raises(UserError, match="use --dtype float32"):
        restore(torch.rand(1, 3, 5, 5), network, dtype="bfloat16")


def test_every_frame_of_a_video_is_what_the_picture_alone_becomes(conv, tmp_path):
    av = pytest.importorskip("av", reason="PyAV is not installed: pip install 'zoo[video]'")
    shades = np.add.outer(np.arange(10), np.arange(12)) * 11  # smooth: H.264 keeps a quarter of the colours of noise
    frames = np.stack([shades, shades // 2, 255 - shades], 2).astype(np.uint8)[None].repeat(3, 0)
    frames[1] //= 2
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("ffv1", rate=5)  # lossless
        stream.width, stream.height, stream.pix_fmt = 12, 10, "bgr0"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())
    seen = []
    found = restore_video(conv, tmp_path / "a.mkv", tmp_path / "b.mkv", progress=lambda *numbers: seen.append(numbers))
    assert (found.frames, found.new_size) == (3, (24, 20))
    assert seen[0] == (0, 0)
    assert (1, 3) in seen
    assert seen[-1] == (3, 3)
    with av.open(str(tmp_path / "b.mkv")) as file:
        restored = [frame.to_ndarray(format="rgb24") / 255 for frame in file.decode(video=0)]
    for frame, out in zip(frames, restored, strict=True):
        expected = restore_picture(conv, Picture(frame / np.float32(255))).pixels
        assert np.abs(out - expected).mean() < 0.025
    assert np.abs(restored[1] - restored[0]).mean() > 0.1


def test_ensemble_is_the_mean_over_all_flips_and_turns(conv):
    image, seen = torch.rand(1, 3, 6, 9), []
    out = restore(image, conv, ensemble=True, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    parts = []
    for flipped in (image, image.flip(2)):
        for turns in range(4):
            one = torch.rot90(restoring.restore_tensor(conv, torch.rot90(flipped, turns, (2, 3))), -turns, (2, 3))
            parts.append(one if flipped is image else one.flip(2))
    clamped = torch.stack(parts)
    assert clamped.std(0).max() > 1e-3, "the network is not symmetric"
    inside = ((clamped > 0) & (clamped < 1)).all(0)  # restore clamps the mean, not its parts
    assert (out - clamped.mean(0))[inside].abs().max() < 1e-5
    turned = restore(torch.rot90(image, 1, (2, 3)), conv, ensemble=True)
    assert (torch.rot90(turned, -1, (2, 3)) - out).abs().max() < 1e-5
    assert "zoo:ensemble" in facts(conv, dtype="float32", tile="auto", ensemble=True)
    assert "zoo:ensemble" not in facts(conv, dtype="float32", tile="auto")


def test_compiled_networks_restore_the_same_also_in_tiles(monkeypatch):
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4, "img_size": 8, "num_feat": 4}
    gates = {"conv_scale": 1.0, "compress_ratio": 1, "squeeze_factor": 2}
    network = create({"family": "hat", **sizes, **gates})
    image = torch.rand(1, 3, 60, 40)
    expected = [restore(image, network, tile=tile) for tile in (None, 40)]
    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_it(self, backend="aot_eager"))
    monkeypatch.setenv("CXX", "python3")  # this back end needs no compiler
    prepared = prepare(network, compiled=True)
    for tile, wanted in zip((None, 40), expected, strict=True):
        assert (restore(image, prepared, tile=tile) - wanted).abs().max() < 1e-5
    assert prepared is network


def test_compiling_without_a_compiler_is_one_sentence(conv, monkeypatch):
    monkeypatch.setattr(restoring.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler .* install g\+\+ or leave it out"):
        prepare(conv, compiled=True)


@pytest.mark.parametrize(("model", "dtype"), [("hat-tiny-x2", "bfloat16"), ("plain-conv-tiny-x2", "float16")])
def test_low_precision_scores_within_a_hundredth_of_a_decibel(model, dtype):
    gt = torch.from_numpy(dict(photos("validation"))["chelsea"]).permute(2, 0, 1)[:, 40:200, 100:300]
    lq = Bicubic(2).fixed(gt)[None]
    protocol = Protocol(crop_border=2, y_channel=True)
    exact, low = (protocol.psnr(restore(lq, model, dtype=name), gt[None]) for name in ("float32", dtype))
    assert exact != low
    assert abs(exact - low) < 0.01
