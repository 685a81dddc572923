import logging

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.images import KEEP_BYTES, Collection, as_channels, read_uint8, size_of, to_array, to_tensor
from zoo.errors import UserError
from zoo.media import list_images, to_uint8


class Images(Collection):
    """The smallest collection: the images of a folder as RGB."""

    def __init__(self, root, keep=KEEP_BYTES):
        self.paths = {path.name: path for path in list_images(root)}
        super().__init__(str(root), list(self.paths), keep=keep)

    def _probe(self, name):
        return size_of(self.paths[name])

    def _load(self, name):
        return read_uint8(self.paths[name], 3)

    def _bytes_per_pixel(self):
        return 3


def write(path, h=8, w=10, mode="RGB", seed=0, **options):
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, *channels), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.fixture
def mixed(tmp_path):
    """Two good images, and one of every kind of bad file."""
    good = {"2.png": write(tmp_path / "2.png"), "10.png": write(tmp_path / "10.png", 12, 6, "L", 1)}
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    write(tmp_path / "cut.png", 64, 64)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    write(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path, good


@pytest.mark.parametrize("keep", [10**9, 0], ids=["in memory", "from disk"])
def test_damaged_files_are_left_out_named_and_counted(mixed, caplog, keep):
    root, good = mixed
    with caplog.at_level(logging.WARNING):
        images = Images(root, keep=keep)
        values = list(images)
        assert len(list(images)) == len(values) == 2
    assert images.names[:2] == ["2.png", "10.png"]  # natural order
    np.testing.assert_array_equal(values[0], good["2.png"])
    np.testing.assert_array_equal(values[1], np.repeat(good["10.png"][..., None], 3, 2))
    report = images.report()
    assert report.count == 2
    assert set(report.unreadable) == {"empty.png", "text.png", "cut.png"}
    assert dict(report.sizes) == {(8, 10): 1, (12, 6): 1}
    if keep:
        assert len(images) == 2
        assert len(caplog.records) == 1
    else:  # the header of cut.png is fine: it was found out when read
        assert len(images) == 3
        with pytest.raises(UserError, match=r"cut\.png is left out: .*damaged or cut off"):
            images[2]
        np.testing.assert_array_equal(images.readable(2), values[0])
        np.testing.assert_array_equal(images.readable(1), values[1])
        assert len(caplog.records) == 2  # once at the start, once when found
        assert "cut.png is left out from now on, 1 of 3" in caplog.text
    for name in report.unreadable:
        assert sum(name in record.getMessage() for record in caplog.records) == 1
        assert name in str(report)
    assert "2 images" in str(report)
    assert "width 6 to 10, height 8 to 12" in str(report)


def test_colour_becomes_rounded_studio_luma(tmp_path):
    pixels = write(tmp_path / "a.png")
    gray = read_uint8(tmp_path / "a.png", 1)
    expected = np.rint(pixels.astype(float) @ [65.481, 128.553, 24.966] / 255 + 16)
    np.testing.assert_array_equal(gray[..., 0], expected)
    assert gray.dtype == np.uint8
    assert as_channels(gray, 1) is gray


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_size_is_that_of_the_upright_image(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write(tmp_path / f"turned.{ending}", 8, 10, exif=exif)
    assert size_of(tmp_path / f"turned.{ending}") == ((10, 8) if orientation >= 5 else (8, 10))
    images = Images(tmp_path)
    assert images[0].shape == (*images.sizes[0], 3)


def test_orientation_of_a_png_is_found_on_both_sides_of_its_pixels_and_decodes_none_in_front(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.png"
    write(path, 200, 300, exif=exif)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert size_of(path) == (300, 200)  # decoding would have found the damage
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    assert size_of(path) == read_uint8(path, 3).shape[:2] == (300, 200)


def test_long_lists_are_shortened(tmp_path):
    write(tmp_path / "good.png")
    for number in range(30):
        (tmp_path / f"bad{number}.png").touch()
    assert "and 10 more" in str(Images(tmp_path).report())


def test_folders_without_a_readable_image_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no readable image; give a folder"):
        Images(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"no readable image \(the first, a.png: empty"):
        Images(tmp_path)


def test_a_folder_that_breaks_completely_later_ends_in_one_sentence(tmp_path):
    write(tmp_path / "a.png", 64, 64)
    images = Images(tmp_path, keep=0)
    (tmp_path / "a.png").unlink()
    for ask in (list, lambda images: images.readable(0)):
        with pytest.raises(UserError, match="none of its 1 images can be read"):
            ask(images)


def test_levels_go_through_tensors_unchanged():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 4, 4)[..., :3]
    tensor = to_tensor(levels)
    assert (tensor.dtype, tensor.shape, tensor.is_contiguous()) == (torch.float32, (3, 16, 4), True)
    assert torch.equal(tensor, torch.from_numpy(levels).permute(2, 0, 1) / 255)
    np.testing.assert_array_equal(to_uint8(to_array(tensor)), levels)
    np.testing.assert_array_equal(to_array(to_tensor(to_array(tensor))), to_array(tensor))
    wild = torch.tensor([-1.0, 2.0, float("nan"), float("inf")], dtype=torch.float64, requires_grad=True)
    assert to_array(wild[None, None])[0, :, 0].tolist() == [0, 1, 0, 1]
