import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from zoo.errors import UserError
from zoo.media import Picture, list_images, read_image, to_uint8, write_image

RNG = np.random.default_rng(0)
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]  # Adam7


def hand_made_png16(values, interlaced, key=None):
    """A PNG written from its specification, apart from zoo's own encoder. values: uint16 (h, w, c)."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    scan = lambda part: b"".join(b"\0" + row.astype(">u2").tobytes() for row in part) if part.size else b""
    grids = [values[y::dy, x::dx] for y, x, dy, dx in PASSES] if interlaced else [values]
    h, w, c = values.shape
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, int(interlaced))
    body = chunk(b"tRNS", key.astype(">u2").tobytes()) if key is not None else b""
    body += chunk(b"IDAT", zlib.compress(b"".join(map(scan, grids)))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (13, 9)])
def test_16_bit_png_is_read_to_the_last_bit(tmp_path, size, channels, interlaced):
    values = RNG.integers(0, 65536, (*size, channels), np.uint16)
    (tmp_path / "a.png").write_bytes(hand_made_png16(values, interlaced))
    picture = read_image(tmp_path / "a.png")
    colours = 1 if channels < 3 else 3
    assert picture.bits == 16
    np.testing.assert_array_equal(np.rint(picture.pixels * 65535.0), values[..., :colours])
    if channels in (2, 4):
        np.testing.assert_array_equal(np.rint(picture.alpha * 65535.0), values[..., -1])
    back = read_image(write_image(tmp_path / "b.png", picture))
    np.testing.assert_array_equal(back.pixels, picture.pixels)
    assert (back.alpha is None) == (picture.alpha is None)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_see_through_colour_is_compared_at_full_depth(tmp_path, channels):
    values = np.full((1, 2, channels), 513, np.uint16)
    values[0, 1] = 514  # differs in the low byte only
    (tmp_path / "a.png").write_bytes(hand_made_png16(values, False, key=values[0, 0]))
    assert read_image(tmp_path / "a.png").alpha.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_16_bit_colour_tiff_is_read_to_the_last_bit(tmp_path, compression, order):
    tifffile = pytest.importorskip("tifffile")  # comes with scikit-image
    values = RNG.integers(0, 65536, (11, 7, 3), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, compression=compression, byteorder=order, photometric="rgb")
    np.testing.assert_array_equal(np.rint(read_image(tmp_path / "a.tif").pixels * 65535.0), values)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".jpg"])
def test_what_is_written_is_read_back_with_profile_and_description(tmp_path, suffix):
    smooth = np.linspace(0, 1, 48 * 40 * 3, dtype=np.float32).reshape(48, 40, 3)
    alpha = None if suffix == ".jpg" else (RNG.random((48, 40)) > 0.5).astype(np.float32)
    profile = Image.open(io.BytesIO(_png_with_profile())).info["icc_profile"]
    picture = Picture(smooth, alpha, info={"icc_profile": profile, "text": {"Title": "a scene"}})
    path = write_image(tmp_path / "deep" / f"a{suffix}", picture, metadata={"zoo": "hat-tiny-x2"})
    back = read_image(path)
    assert np.abs(back.pixels - smooth).max() < (0.03 if suffix == ".jpg" else 0.002)
    assert back.info["icc_profile"] == profile
    if alpha is not None:
        np.testing.assert_array_equal(back.alpha, alpha)
    if suffix == ".png":
        assert back.info["text"] == {"Title": "a scene", "zoo": "hat-tiny-x2"}
    else:
        assert Image.open(path).getexif()[0x010E] == "Title=a scene; zoo=hat-tiny-x2"


def _png_with_profile():
    from PIL import ImageCms

    stream = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (2, 2)).save(stream, "PNG", icc_profile=profile)
    return stream.getvalue()


def test_16_bit_png_carries_text_and_profile(tmp_path):
    picture = Picture(np.full((3, 3, 3), 0.5, np.float32), bits=16, info={"icc_profile": b"12345"})
    path = write_image(tmp_path / "a.png", picture, metadata={"model": "größe → 2"})
    back = read_image(path)
    assert back.info == {"icc_profile": b"12345", "text": {"model": "größe → 2"}}


def test_tiff_and_jpeg_orientation_is_applied_once(tmp_path):
    ramp = np.arange(15, dtype=np.uint8).reshape(3, 5) * 17
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.tiff", "a.jpg"):
        Image.fromarray(ramp).save(tmp_path / name, exif=exif)
        picture = read_image(tmp_path / name)
        assert picture.pixels.shape == (5, 3, 1)
        assert np.abs(to_uint8(picture.pixels[..., 0]).astype(int) - np.rot90(ramp, -1)).max() <= 24


BAD = {
    "text.png": (b"hello, this is a letter", "not a PNG, JPEG, WebP.*begins with b'hello"),
    "zero.png": (b"", "empty"),
    "short.png": (b"\x89PNG\r\n\x1a\n", "damaged or cut off"),
    "flat.png": (hand_made_png16(np.zeros((0, 4, 3), np.uint16), False), "no pixels|damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_sentence_with_its_name(tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_cut_off_file_is_an_error_not_a_gray_picture(tmp_path, kind):
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(stream, kind)
    for share in (0.5, 0.9):
        (tmp_path / "a").write_bytes(stream.getvalue()[: int(len(stream.getvalue()) * share)])
        with pytest.raises(UserError, match="damaged or cut off"):
            read_image(tmp_path / "a")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_several_frames_are_refused_with_their_number(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), (i * 80, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"holds 3 frames.*ffmpeg"):
        read_image(tmp_path / "a")


def test_single_frame_gif_and_phone_jpeg_with_a_preview_are_read(tmp_path):
    image = Image.new("RGB", (8, 6), (255, 0, 0))
    image.save(tmp_path / "a.gif")
    image.save(tmp_path / "b.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (4, 3))])
    for name in ("a.gif", "b.jpg"):
        assert read_image(tmp_path / name).pixels.shape == (6, 8, 3)


def test_huge_image_is_refused_before_decoding_and_allowed_on_request(tmp_path):
    chunk = hand_made_png16(np.zeros((2, 2, 1), np.uint16), False)
    header = struct.pack(">IIBBBBB", 100_000, 90_000, 16, 0, 0, 0, 0)
    chunk = chunk[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + chunk[33:]
    (tmp_path / "huge.png").write_bytes(chunk)
    with pytest.raises(UserError, match=r"100000x90000 is above the limit of 178,956,970 pixels.*--max-pixels"):
        read_image(tmp_path / "huge.png")
    Image.new("L", (20, 20)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="20x20 is above the limit of 399"):
        read_image(tmp_path / "small.png", max_pixels=399)
    assert read_image(tmp_path / "small.png", max_pixels=400).pixels.shape == (20, 20, 1)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png: no such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="a folder, not an image"):
        read_image(tmp_path)


def test_existing_output_is_kept_without_force(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--force"):
        write_image(path, np.zeros((2, 2)))
    assert path.read_bytes() == b"mine"
    write_image(path, np.zeros((2, 2)), force=True)
    assert read_image(path).pixels.shape == (2, 2, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_formats_that_cannot_hold_the_picture_are_refused(tmp_path):
    gray = np.zeros((2, 2, 1), np.float32)
    for name, words, picture in (
        ("a.gif", "zoo writes .png", Picture(gray)),
        ("a.jpg", "only PNG keeps 16 bits", Picture(gray, bits=16)),
        ("a.jpg", "JPEG has no transparency", Picture(gray, gray[..., 0])),
    ):
        with pytest.raises(UserError, match=words):
            write_image(tmp_path / name, picture)
    with pytest.raises(UserError, match=r"refuses 17000x1 .*\.png"):
        write_image(tmp_path / "a.webp", np.zeros((1, 17000)))
    assert list(tmp_path.iterdir()) == []


def test_images_are_listed_in_natural_order_without_hidden_ones(tmp_path):
    for name in ("img10.png", "img2.PNG", "Img1.jpg", ".hidden.png", "notes.txt", "sub/a.webp", ".cache/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in list_images(tmp_path)] == ["Img1.jpg", "img2.PNG", "img10.png"]
    assert len(list_images(tmp_path, recursive=True)) == 4
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_images(tmp_path / "none")
    with pytest.raises(UserError, match="not a folder"):
        list_images(tmp_path / "notes.txt")
