import pytest

from tests.models.plugins.denoisers import H, W, built, output
from tests.models.plugins.hosts.reach import check
from zoo import apply
from zoo.errors import UserError
from zoo.models.plugins.hosts import Layout


def test_the_picture_comes_first_and_text_alone_is_refined_as_it_was():
    layout, layers = check("zimage")
    assert layout == Layout((H, W))
    assert not [name for name in layers if "context" in name]
    assert len(layers) == 3


def test_texts_of_different_lengths_are_filled_up_on_their_own():
    filled = -(H * W) % 32
    assert check("zimage", padded=True)[0] == Layout((H, W), 0, (filled + 32, filled + 64))


def test_pictures_of_different_sizes_are_refused():
    denoiser, call = built("zimage")
    apply(denoiser, "clear-8")
    call["x"][1] = call["x"][1][:, :, :8]
    with pytest.raises(UserError, match="pictures of one size"):
        output(denoiser, call)
