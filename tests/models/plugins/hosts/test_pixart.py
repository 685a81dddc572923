from tests.models.plugins.denoisers import H, W
from tests.models.plugins.hosts.reach import check
from zoo.models.plugins.hosts import Layout


def test_patches_are_the_grid():
    assert check("pixart") == (Layout((H, W)), [f"transformer_blocks.{n}.attn1" for n in range(2)])
