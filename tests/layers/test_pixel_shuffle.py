import pytest
import torch

from zoo.layers.pixel_shuffle import Upsample, upscale_of


@pytest.mark.parametrize("upscale", [1, 2, 3, 4, 8])
def test_size_grows_by_the_factor_and_weights_tell_it(upscale):
    head = Upsample(upscale, 4)
    assert head(torch.rand(1, 4, 3, 5)).shape == (1, 4, 3 * upscale, 5 * upscale)
    assert upscale_of([p.shape[0] for name, p in head.named_parameters() if name.endswith("weight")], 4) == upscale
