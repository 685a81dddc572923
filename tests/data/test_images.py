import logging

import numpy as np
import pytest
from PIL import Image

from zoo.data.images import ImageFolder, as_channels, size_of
from zoo.errors import UserError


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
        images = ImageFolder(root, keep=keep)
        values = [images[i] for i in range(len(images))]
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
    else:  # the header of cut.png is fine: it was found out when read, and another image took its place
        assert len(images) == 3
        np.testing.assert_array_equal(values[2], values[0])
        np.testing.assert_array_equal(images[2], values[0])
        assert len(caplog.records) == 2  # once at the start, once when found
    for name in report.unreadable:
        assert sum(name in record.getMessage() for record in caplog.records) == 1
        assert name in str(report)
    assert "2 images" in str(report)
    assert "width 6 to 10, height 8 to 12" in str(report)


def test_sub_folders_on_request(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "in" / "b.png")
    assert ImageFolder(tmp_path).names == ["a.png"]
    assert ImageFolder(tmp_path, recursive=True).names == ["a.png", "in/b.png"]


def test_gray_collections_take_rounded_studio_luma(tmp_path):
    pixels = write(tmp_path / "a.png")
    [gray] = ImageFolder(tmp_path, channels=1)
    expected = np.rint(pixels.astype(float) @ [65.481, 128.553, 24.966] / 255 + 16)
    np.testing.assert_array_equal(gray[..., 0], expected)
    assert gray.dtype == np.uint8
    assert as_channels(gray, 1) is gray


def test_size_is_that_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(tmp_path / "turned.jpg", 8, 10, exif=exif)
    assert size_of(tmp_path / "turned.jpg") == (10, 8)
    assert ImageFolder(tmp_path)[0].shape == (10, 8, 3)


def test_long_lists_are_shortened(tmp_path):
    write(tmp_path / "good.png")
    for number in range(30):
        (tmp_path / f"bad{number}.png").touch()
    assert "and 10 more" in str(ImageFolder(tmp_path).report())


def test_folders_without_a_readable_image_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no readable image; give a folder"):
        ImageFolder(tmp_path)
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError, match=r"no readable image \(the first, a.png: empty"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "none")


def test_a_folder_that_breaks_completely_later_ends_in_one_sentence(tmp_path):
    write(tmp_path / "a.png", 64, 64)
    images = ImageFolder(tmp_path, keep=0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        images[0]
