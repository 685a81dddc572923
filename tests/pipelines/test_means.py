import pytest
import torch
from torch import nn

from zoo.layers.global_mean import GlobalMean
from zoo.pipelines.means import Means, _cores

SIZE = (6, 8)
STARTS = ((0, 4, 8), (0, 5))


class Gated(nn.Module):
    """Pointwise, but for two gates by means of the whole image, the second of which depends on the first."""

    def __init__(self, gates=2):
        super().__init__()
        self.means = nn.ModuleList(GlobalMean() for _ in range(gates))
        self.runs_to_the_end = 0

    def forward(self, image):
        for mean in self.means:
            image = image * (1 + mean(image)).sigmoid() + image.square()
        self.runs_to_the_end += 1
        return image


def tiles_of(image):
    corners = [(i, j) for i in range(len(STARTS[0])) for j in range(len(STARTS[1]))]
    places = [(STARTS[0][i], STARTS[1][j]) for i, j in corners]
    return corners, [image[..., y : y + SIZE[0], x : x + SIZE[1]] for y, x in places]


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_tiles_give_what_the_whole_image_gives(batch):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 14, 13, dtype=torch.float64)
    network = Gated()
    expected = network(image)
    means = Means(network, STARTS, SIZE, 2)
    assert means.passes == 2
    corners, tiles = tiles_of(image)
    for _ in range(means.passes):
        for first in range(0, len(tiles), batch):
            means.collect(torch.cat(tiles[first : first + batch]), corners[first : first + batch])
        means.settle()
    assert network.runs_to_the_end == 1  # the passes stopped at the last mean
    _, wanted = tiles_of(expected)
    with means.applied():
        for tile, part in zip(tiles, wanted, strict=True):
            torch.testing.assert_close(network(tile), part)
    assert all(module.gather is None for module in network.means)


def test_without_means_there_are_no_passes():
    assert Means(nn.Conv2d(1, 1, 1), STARTS, SIZE, 2).passes == 0


def test_an_error_inside_leaves_the_network_as_it_was():
    network = Gated(1)
    means = Means(network, STARTS, SIZE, 1)
    with pytest.raises(RuntimeError), means.applied():
        raise RuntimeError
    assert network.means[0].gather is None


@pytest.mark.parametrize(("starts", "size"), [((0,), 9), ((0, 3, 6), 5), ((0, 8, 16), 32), ((0, 4), 4)])
def test_cores_cover_the_axis_once(starts, size):
    seen = [
        start + i for start, (first, last) in zip(starts, _cores(starts, size), strict=True) for i in range(first, last)
    ]
    assert seen == list(range(starts[-1] + size))
