import torch

from zoo.layers.tokens import to_map, to_tokens


def test_tokens_are_the_pixels_of_a_map_row_by_row_and_back_without_a_copy():
    features = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tokens = to_tokens(features)
    assert torch.equal(tokens[1, 7], features[1, :, 1, 2])
    assert torch.equal(to_map(tokens, (4, 5)), features)
    assert to_map(tokens, (4, 5)).data_ptr() == tokens.data_ptr() == features.data_ptr()
    assert to_map(torch.rand(2, 20, 3), (4, 5)).is_contiguous(memory_format=torch.channels_last)


def test_a_map_of_one_image_is_channels_last_to_convolutions_too():
    single = to_map(torch.rand(1, 20, 3), (4, 5))
    assert torch.nn.Conv2d(3, 2, 3)(single).is_contiguous(memory_format=torch.channels_last)
