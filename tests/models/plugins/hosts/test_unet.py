from tests.models.plugins.denoisers import H, W
from tests.models.plugins.hosts.reach import check
from zoo.models.plugins.hosts import Layout


def test_all_self_attention_is_found_and_latents_are_the_grid():
    layout, layers = check("unet")
    assert layout == Layout((2 * H, 2 * W))
    assert len(layers) == 7
    assert layers[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert layers[-1] == "mid_block.attentions.0.transformer_blocks.0.attn1"
