import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from zoo.errors import UserError
from zoo.media.pixels import Picture, decode, from_pil, to_pil, to_uint8, to_uint16, to_unit

RAMP = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_every_mode_becomes_gray_or_rgb_with_alpha_apart(mode):
    colour = Image.fromarray(np.dstack([RAMP, 255 - RAMP, RAMP]))
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(RAMP.astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode]) / {"F": 255}.get(mode, 1))
        image = image if mode == "F" else Image.fromarray(RAMP.astype({"I;16": "u2", "I": "i4"}[mode]) * 257)
    else:
        image = colour.convert(mode)
    assert image.mode == mode
    picture = from_pil(image)
    gray = mode in ("1", "L", "LA", "I;16", "I", "F")
    assert picture.pixels.shape == (4, 6, 1 if gray else 3)
    assert picture.pixels.dtype == np.float32
    assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))
    assert picture.bits == (16 if mode in ("I;16", "I", "F") else 8)
    if mode in ("I;16", "I", "F", "L"):
        expected = RAMP if mode != "L" else np.asarray(colour.convert("L"))
        np.testing.assert_allclose(picture.pixels[..., 0], expected / 255, atol=1e-7)


def test_values_outside_the_range_of_a_wide_mode_are_refused():
    with pytest.raises(UserError, match="mode F must lie between 0 and 1"):
        from_pil(Image.fromarray(np.full((2, 2), 3.5, np.float32)))
    with pytest.raises(UserError, match="mode I must lie between 0 and 65535"):
        from_pil(Image.fromarray(np.full((2, 2), 70000, np.int32)))


def test_see_through_colour_of_gray_rgb_and_palette_becomes_alpha():
    for mode, key in (("L", 0), ("RGB", (0, 0, 0)), ("P", 0)):
        image = Image.new(mode, (2, 1), 0)
        image.putpixel((1, 0), 200 if mode != "RGB" else (200, 1, 1))
        image.info["transparency"] = key
        assert from_pil(image).alpha.tolist() == [[0.0, 1.0]], mode


def test_cmyk_uses_the_profile_inside_and_survives_a_broken_one():
    image = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    plain = from_pil(image).pixels
    assert plain[0, 0, 0] > 0.9
    assert plain[0, 0, 1] < 0.1
    image.info["icc_profile"] = b"not a profile"
    np.testing.assert_array_equal(from_pil(image).pixels, plain)
    rgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.info["icc_profile"] = rgb_profile  # of another colour space: no transform can be built
    picture = from_pil(image)
    np.testing.assert_array_equal(picture.pixels, plain)
    assert "icc_profile" not in picture.info  # the pixels are no longer in the file's space


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_pillows_own_transposition(orientation):
    from PIL import ImageOps

    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RAMP).save(stream, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(stream))
    np.testing.assert_array_equal(to_uint8(decode(Image.open(stream)).pixels)[..., 0], np.asarray(expected))


def test_pil_round_trip_keeps_mode_values_and_profile():
    for mode in ("L", "LA", "RGB", "RGBA"):
        values = np.random.default_rng(0).integers(0, 256, (5, 7, len(mode)), np.uint8)
        image = Image.fromarray(values.squeeze(-1) if mode == "L" else values)
        image.info["icc_profile"] = b"profile"
        back = to_pil(from_pil(image))
        assert back.mode == mode
        assert back.info["icc_profile"] == b"profile"
        np.testing.assert_array_equal(np.asarray(back), np.asarray(image))
    deep = np.array([[0, 1], [40000, 65535]], np.uint16)
    assert to_pil(from_pil(Image.fromarray(deep))).mode == "I;16"
    np.testing.assert_array_equal(np.asarray(to_pil(from_pil(Image.fromarray(deep)))), deep)


def test_rounding_is_half_to_even_after_clamping():
    ties = np.array([-1, 0.5, 1.5, 2.5, 254.5, 300], np.float64) / 255
    assert to_uint8(ties).tolist() == [0, 0, 2, 2, 254, 255]
    eight, sixteen = np.arange(256, dtype=np.uint8)[None], np.arange(65536, dtype=np.uint16)[None]
    np.testing.assert_array_equal(to_uint8(to_unit(eight))[..., 0], eight)
    np.testing.assert_array_equal(to_uint16(to_unit(sixteen))[..., 0], sixteen)


def test_unit_refuses_ambiguous_integers():
    with pytest.raises(ValueError, match="dtype must be float, uint8, uint16 or bool, got int64"):
        to_unit(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"must be \(h, w\) or \(h, w, c\), got \(2,\)"):
        to_unit(np.zeros(2))
    assert Picture(to_unit(np.ones((2, 2), bool))).pixels.max() == 1
