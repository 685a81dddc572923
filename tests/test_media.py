import subprocess
import sys

import numpy as np

from zoo import media


def test_importing_media_brings_no_torch():
    code = "import sys, zoo.media; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_picture_goes_through_the_public_names_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = media.write_image(tmp_path / "a.png", pixels, metadata={"model": "none"})
    picture = media.read_image(path)
    assert media.list_images(tmp_path) == [path]
    assert picture.info["text"] == {"model": "none"}
    np.testing.assert_array_equal(media.to_uint8(picture.pixels), pixels)
    assert all(hasattr(media, name) for name in media.__all__)
