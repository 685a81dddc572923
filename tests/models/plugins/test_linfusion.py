import pytest
import torch

from tests.helpers import golden
from tests.models.plugins.denoisers import built, output
from zoo import apply
from zoo.errors import UserError
from zoo.models.plugins.linfusion import LinFusionConfig

GOLDEN = 1e-5  # relative to the largest value, as for all golden data


def part(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def mounted():
    from diffusers import UNet2DConditionModel

    facts, tensors = golden("linfusion-unet")
    unet = UNet2DConditionModel(**facts["json"]["unet_config"]).eval()
    unet.load_state_dict(part(tensors, "weight.unet."), strict=False)
    apply(unet, LinFusionConfig(), part(tensors, "weight.linfusion."))
    return unet, facts["json"], tensors


@pytest.mark.parametrize("case", ["square", "nonsquare", "odd"])
def test_a_unet_with_official_layers_gives_the_official_numbers(mounted, case):
    unet, _, tensors = mounted
    given = part(tensors, f"input.{case}.")
    expected = tensors[f"output.{case}"]
    assert (output(unet, given) - expected).abs().max() <= GOLDEN * expected.abs().max()


def test_layers_are_listed_as_in_the_official_config(mounted):
    unet, facts, _ = mounted
    listed = unet.zoo.plugin.described()["modules_list"]
    official = facts["linfusion_config"]["modules_list"]
    assert [entry | {"projection_mid_dim": None} for entry in listed] == official


def test_it_begins_as_wide_as_its_settings_say_and_is_stored_so(tmp_path):
    denoiser, call = built("unet")
    handle = apply(denoiser, LinFusionConfig(mid_dim_scale=4))
    assert denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1").to_q_[0].out_features == 8
    with torch.no_grad():
        for parameter in handle.plugin.parameters().values():
            parameter.add_(0.1)
    trained = output(denoiser, call)
    folder = handle.save_pretrained(tmp_path / "kept")
    handle.remove()
    again = apply(denoiser, folder)
    assert again.plugin.config.mid_dim_scale == 4
    assert torch.equal(output(denoiser, call), trained)


def test_without_p_queries_are_doubled_as_in_the_official_code():
    denoiser, _ = built("unet")
    plugin = apply(denoiser, LinFusionConfig(mid_dim_scale=None)).plugin
    attention = next(iter(plugin.layers.values()))
    tokens = torch.randn(1, 5, 16)
    assert torch.equal(plugin.project(attention, tokens, tokens)[0], attention.to_q(2 * tokens))


def test_it_begins_with_the_projections_of_the_unet_or_at_random():
    denoiser, _ = built("unet")
    attention = denoiser.mid_block.attentions[0].transformer_blocks[0].attn1
    own = attention.to_q.weight.clone()
    handle = apply(denoiser, LinFusionConfig())
    tokens = torch.randn(1, 5, 32)
    assert torch.equal(attention.to_q.weight, own)
    assert not attention.to_q_(tokens).any()
    handle.remove()
    handle = apply(denoiser, LinFusionConfig(init="random"))
    assert not torch.equal(attention.to_q.weight, own)
    assert attention.to_q_(tokens).any()
    handle.remove()
    assert torch.equal(attention.to_q.weight, own)


def test_transformers_are_refused():
    with pytest.raises(UserError, match="must be a UNet of Stable Diffusion, got Flux"):
        apply(built("flux")[0], "linfusion")


@pytest.mark.parametrize("wrong", [{"mid_dim_scale": 0}, {"init": "teacher"}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        LinFusionConfig(**wrong)
