import torch

from zoo.layers.vgg import CONVS, NAMES, VGG19

POOLS = [4, 9, 18, 27, 36]  # places of torchvision's pools


def test_names_and_shapes_are_those_of_torchvision():
    with torch.device("meta"):
        network = VGG19()
    convs = [n for n in range(36) if n not in POOLS and isinstance(network.features[n], torch.nn.Conv2d)]
    assert convs == [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    assert sum(p.numel() for p in network.parameters()) == 20_024_384
    assert list(network.state_dict())[:2] == ["features.0.weight", "features.0.bias"]
    assert len(NAMES) == sum(CONVS) == 16


def test_only_what_is_asked_for_is_returned_and_computed():
    network = VGG19().eval()
    seen = []
    network.features[5].register_forward_hook(lambda *_: seen.append(5))
    found = network(torch.rand(1, 3, 8, 12), ["conv1_2"])
    assert not seen
    assert [(name, tuple(x.shape)) for name, x in found.items()] == [("conv1_2", (1, 64, 8, 12))]
    assert found["conv1_2"].min() < 0, "before the ReLU"
    found = network(torch.rand(1, 3, 32, 32), {"conv5_4": 1.0, "conv2_1": 1.0})
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "conv2_1": (1, 128, 16, 16),
        "conv5_4": (1, 512, 2, 2),
    }
    assert seen
