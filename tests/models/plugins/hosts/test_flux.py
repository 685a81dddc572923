from tests.models.plugins.denoisers import TEXT, H, W
from tests.models.plugins.hosts.reach import check
from zoo.models.plugins.hosts import Layout


def test_the_picture_lies_behind_the_text():
    layout, layers = check("flux")
    assert layout == Layout((H, W), TEXT)
    assert len(layers) == 4
