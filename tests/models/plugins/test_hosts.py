import pytest
import torch
from torch import nn

from tests.models.plugins.denoisers import DENOISERS, built, ids
from zoo.errors import UserError
from zoo.models.plugins.hosts import Layout, find_host, grid_of


@pytest.mark.parametrize("name", DENOISERS)
def test_each_denoiser_has_one_host(name):
    host = find_host(built(name)[0])
    assert type(host).__module__.endswith(f"hosts.{name}")


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="knows no Linear"):
        find_host(nn.Linear(1, 1))


def test_layers_further_down_have_halves_of_the_grid():
    assert Layout((11, 13), 0).of(6 * 7) == Layout((6, 7), 0)
    assert Layout((11, 13), 5).of(11 * 13 + 5) == Layout((11, 13), 5)


def test_grids_are_read_off_places():
    assert grid_of(ids(3, 5, 7)) == (5, 7)
    edited = ids(3, 4, 4)
    edited[:, 0] = 1
    assert grid_of(torch.cat([ids(3, 5, 7), edited])) == (5, 7), "the first picture"
    with pytest.raises(UserError, match="img_ids must hold the rows and columns of a grid"):
        grid_of(ids(3, 5, 7)[torch.randperm(35, generator=torch.Generator().manual_seed(0))])
    with pytest.raises(UserError, match="img_ids must hold the rows and columns of a grid"):
        grid_of(torch.zeros(35, 3))
