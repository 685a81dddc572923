import pytest
import torch

from zoo.layers.pixel_shuffle import UPSCALES, Upsample, upscale_of


@pytest.mark.parametrize("upscale", UPSCALES)
def test_size_grows_by_the_factor_and_weights_tell_it(upscale):
    head = Upsample(upscale, 4)
    assert head(torch.rand(1, 4, 3, 5)).shape == (1, 4, 3 * upscale, 5 * upscale)
    assert upscale_of([p.shape[0] for name, p in head.named_parameters() if name.endswith("weight")], 4) == upscale


@pytest.mark.parametrize("upscale", [-2, 0, 5, 6, 16])
def test_another_factor_is_refused(upscale):
    with pytest.raises(ValueError, match=f"upscale must be 1, 2, 3, 4 or 8, got {upscale}"):
        Upsample(upscale, 4)
