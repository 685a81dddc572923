import pytest
import torch

from tests.helpers import golden
from tests.models.plugins.denoisers import built
from zoo import apply
from zoo.errors import UserError
from zoo.models.plugins.clear import ClearConfig

GOLDEN = 1e-5  # relative to the largest value, as for all golden data
CASES = [
    *[("clear-local", case) for case in ("square", "nonsquare", "odd", "radius1", "radius_over_grid", "highres")],
    *[("clear-down", case) for case in ("square", "nonsquare", "radius_over_grid", "highres")],
    ("clear-down-text512", "square"),
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_transformer_with_official_processors_gives_the_official_numbers(name, case):
    from diffusers import FluxTransformer2DModel

    facts, tensors = golden(name)
    said = facts["json"]["cases"][case]
    weights = {key.removeprefix("weight."): value for key, value in tensors.items() if key.startswith("weight.")}
    tables = {key: weights.pop(key) for key in list(weights) if "spatial_weight" in key}
    denoiser = FluxTransformer2DModel(**facts["json"]["config"]).eval()
    denoiser.load_state_dict(weights)
    config = ClearConfig(
        said["window_size"],
        said["down_factor"] if said["down_factor"] > 1 else None,
        said.get("proportional_attention", False),
        said.get("ntk_factor", 1.0),
    )
    handle = apply(denoiser, config)
    own = {key: value.detach().clone() for key, value in handle.plugin.parameters().items()}
    assert tables.keys() <= own.keys()
    handle.load(own | tables)
    given = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"input.{case}.")}
    with torch.no_grad():
        found = denoiser(**given, txt_ids=torch.zeros(said["text_length"], 3)).sample
    expected = tensors[f"output.{case}"]
    assert (found - expected).abs().max() <= GOLDEN * expected.abs().max()
    handle.remove()
    assert denoiser.pos_embed.theta == 10000


def test_rotary_embeddings_without_a_base_cannot_be_stretched():
    with pytest.raises(UserError, match="ntk_factor must be 1 on Stable Diffusion 3"):
        apply(built("sd3")[0], ClearConfig(ntk_factor=10))


def test_students_match_every_fourth_layer_of_the_single_blocks():
    denoiser, _ = built("flux")
    plugin = apply(denoiser, "clear-8").plugin
    plugin.layers = {f"transformer_blocks.{n}.attn": None for n in range(19)} | {
        f"single_transformer_blocks.{n}.attn": None for n in range(38)
    }
    assert plugin.align() == [f"single_transformer_blocks.{n}.attn" for n in range(1, 38, 4)]


@pytest.mark.parametrize("wrong", [{"window_size": 0}, {"down_factor": 0}, {"ntk_factor": 0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        ClearConfig(**wrong)
