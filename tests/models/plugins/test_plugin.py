import copy
import logging

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from tests.models.plugins.denoisers import built, output
from zoo import applied, apply
from zoo.errors import UserError
from zoo.models.plugins.clear import ClearConfig
from zoo.models.plugins.linfusion import LinFusionConfig


@pytest.fixture
def unet():
    return built("unet")


def weights_of(denoiser):
    return {key: value.clone() for key, value in denoiser.state_dict().items()}


def test_removal_brings_back_every_bit_after_training(unet):
    denoiser, call = unet
    before, stock = weights_of(denoiser), output(denoiser, call)
    processors = list(denoiser.attn_processors.values())
    with applied(denoiser, "linfusion") as handle:
        handle.keep()
        with torch.no_grad():
            for parameter in handle.plugin.parameters().values():
                parameter.mul_(1.1)
        assert not torch.equal(output(denoiser, call), stock)
    after = weights_of(denoiser)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(a is b for a, b in zip(denoiser.attn_processors.values(), processors, strict=True))
    assert torch.equal(output(denoiser, call), stock)
    assert "save_pretrained" not in vars(denoiser)
    assert not denoiser._forward_pre_hooks
    with pytest.raises(UserError, match="removed before"):
        handle.remove()


def test_a_second_plugin_is_refused(unet):
    denoiser, _ = unet
    apply(denoiser, "linfusion")
    with pytest.raises(UserError, match="LinFusion is on this denoiser already"):
        apply(denoiser, "clear-8")


def test_weights_of_another_base_model_change_nothing(unet):
    denoiser, call = unet
    stock = output(denoiser, call)
    good = {key: value.detach() for key, value in apply(denoiser, "linfusion").plugin.parameters().items()}
    denoiser.zoo.remove()
    wrong = [
        (good | {"7.to_q.weight": torch.zeros(2, 2)}, "have unknown 7.to_q.weight"),
        ({key: value for key, value in good.items() if not key.startswith("3.")}, "lack 3"),
        (good | {"2.to_v.weight": torch.zeros(3, 3)}, r"2.to_v.weight must be \(32, 32\), got \(3, 3\)"),
    ]
    for weights, said in wrong:
        with pytest.raises(UserError, match=said):
            apply(denoiser, "linfusion", weights)
        assert torch.equal(output(denoiser, call), stock)
        assert not hasattr(denoiser, "zoo")


def test_a_copy_carries_its_own_plugin(unet):
    denoiser, call = unet
    stock = output(denoiser, call)
    handle = apply(denoiser, ClearConfig(2))
    local = output(denoiser, call)
    twin = copy.deepcopy(denoiser)
    handle.remove()
    assert torch.equal(output(denoiser, call), stock)
    assert torch.equal(output(twin, call), local)
    twin.zoo.remove()
    assert torch.equal(output(twin, call), stock)


def test_a_saved_denoiser_is_a_stock_one_and_says_so(unet, tmp_path, caplog):
    denoiser, _ = unet
    apply(denoiser, "linfusion")
    with caplog.at_level(logging.WARNING):
        denoiser.save_pretrained(tmp_path)
    assert "LinFusion is on this denoiser: what is saved now comes back without it" in caplog.text
    assert not hasattr(UNet2DConditionModel.from_pretrained(tmp_path), "zoo")


def test_processors_made_anew_from_their_class_go_on(unet):
    denoiser, call = unet
    apply(denoiser, ClearConfig(2))
    local = output(denoiser, call)
    for layer in denoiser.zoo.plugin.layers.values():  # as IP-Adapter does
        layer.set_processor(type(layer.processor)())
    assert torch.equal(output(denoiser, call), local)


def test_fused_projections_follow_what_is_loaded():
    denoiser, call = built("flux")
    weights = {key: 1.1 * value.detach() for key, value in apply(denoiser, "clear-8").plugin.parameters().items()}
    denoiser.zoo.remove()
    stock = output(denoiser, call)
    apply(denoiser, "clear-8", weights)
    expected = output(denoiser, call)
    denoiser.zoo.remove()
    denoiser.fuse_qkv_projections()
    apply(denoiser, "clear-8", weights)
    torch.testing.assert_close(output(denoiser, call), expected, rtol=1e-4, atol=1e-5)
    denoiser.zoo.remove()
    denoiser.unfuse_qkv_projections()
    assert torch.equal(output(denoiser, call), stock)


def test_two_denoisers_and_changing_sizes_keep_apart(unet):
    denoiser, call = unet
    other, _ = built("unet")
    apply(denoiser, ClearConfig(2))
    apply(other, ClearConfig(3))
    small = call | {"sample": call["sample"][:, :, :8, :14]}
    first = [output(denoiser, call), output(other, call), output(denoiser, small)]
    again = [output(denoiser, call), output(other, call), output(denoiser, small)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", ["unet", "flux", "qwenimage"])
def test_compiled_without_breaks_it_gives_the_same(name):
    denoiser, call = built(name)
    apply(denoiser, ClearConfig(2))
    expected = output(denoiser, call)
    for block in [m for m in denoiser.modules() if type(m).__name__ in getattr(denoiser, "_repeated_blocks", ())]:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output(denoiser, call), expected, rtol=1e-4, atol=1e-5)


def test_offloaded_denoisers_are_refused(unet):
    denoiser, _ = unet
    denoiser.mid_block._hf_hook = object()
    with pytest.raises(UserError, match="offload hooks are on mid_block"):
        apply(denoiser, "linfusion")
    with pytest.raises(UserError, match="meta device"), torch.device("meta"):
        apply(built("unet")[0].to("meta"), "linfusion")


def test_shards_of_sequences_are_refused():
    denoiser, _ = built("flux")
    for layer in denoiser.attn_processors.values():
        layer._parallel_config = object()
    with pytest.raises(UserError, match="context parallel is on"):
        apply(denoiser, "clear-8")


def test_lost_processors_are_counted(unet):
    denoiser, _ = unet
    handle = apply(denoiser, "linfusion-16")
    assert "7 layers" in repr(handle.summary())
    next(iter(handle.plugin.layers.values())).set_processor(object())
    assert "6 of 7" in repr(handle.summary())


@pytest.mark.parametrize(
    ("plugin", "said"),
    [("linfusoin", "Did you mean 'linfusion'"), ("clear-12", "plug-in 'clear-12' is unknown")],
)
def test_unknown_names_are_refused(unet, plugin, said):
    with pytest.raises(UserError, match=said):
        apply(unet[0], plugin)


def test_folders_of_something_else_are_refused(unet, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(UserError, match="describes no plug-in"):
        apply(unet[0], tmp_path)


def test_what_has_no_denoiser_is_refused():
    with pytest.raises(UserError, match="neither a unet nor a transformer"):
        apply(object(), LinFusionConfig())
    with pytest.raises(UserError, match="knows no Linear"):
        apply(nn.Linear(2, 2), LinFusionConfig())
