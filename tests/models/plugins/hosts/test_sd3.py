from tests.models.plugins.denoisers import H, W
from tests.models.plugins.hosts.reach import check
from zoo.models.plugins.hosts import Layout


def test_the_picture_comes_first_and_attends_alone_in_some_blocks():
    layout, layers = check("sd3")
    assert layout == Layout((H, W))
    assert layers == [f"transformer_blocks.{name}" for name in ("0.attn", "0.attn2", "1.attn", "2.attn")]
