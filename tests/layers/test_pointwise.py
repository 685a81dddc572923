import pytest
import torch
from torch import nn

from zoo.layers.pointwise import Pointwise


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_a_1x1_convolution_with_the_same_weights(layout, bias):
    torch.manual_seed(0)
    plain, ours = nn.Conv2d(3, 5, 1, bias=bias), Pointwise(3, 5, bias=bias)
    ours.load_state_dict(plain.state_dict())
    features = torch.rand(2, 3, 4, 6).contiguous(memory_format=layout)
    torch.testing.assert_close(ours(features), plain(features))
    if layout is torch.channels_last:
        assert ours(features).is_contiguous(memory_format=layout)
