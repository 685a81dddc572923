import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from zoo.errors import UserError
from zoo.models import FAMILIES, create, detect, family_of, list_models, load, lookup, needs
from zoo.models.weights import write_weights

SMALL = {"family": "plain-conv", "embed_dim": 4, "depth": 1, "num_feat": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_agrees_with_the_model_file(family):
    row, described = FAMILIES[family], lookup(family)
    assert set(row.variants) == set(described.variants)
    for name, (upscale, multiple, parameters) in row.variants.items():
        with torch.device("meta"):
            net = create(name)
        if described.needs is None:
            assert (upscale, multiple) == (0, 1)
        else:
            asked = needs(net)
            assert (asked.upscale, asked.multiple, asked.dtypes) == (upscale, multiple, row.dtypes)
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert (net.variant, family_of(net)) == (name, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_claims_the_weights_of_another(family):
    for name in FAMILIES[family].variants:
        with torch.device("meta"):
            state = create(name).state_dict()
        assert [other for other in FAMILIES if lookup(other).detect(state) is not None] == [family]
        assert detect(state)[0] == family


def test_names_are_matched_like_files():
    assert [facts.name for facts in list_models("hat-s-*")] == ["hat-s-x2", "hat-s-x3", "hat-s-x4"]
    assert all(facts.licence for facts in list_models())


def test_listing_imports_no_torch():
    code = "import sys, zoo.models; zoo.models.list_models(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_create_takes_a_variant_with_changes():
    net = create({"variant": "plain-conv-tiny-x2", "depth": 2})
    assert (net.depth, net.embed_dim, net.variant) == (2, create("plain-conv-tiny-x2").embed_dim, None)
    assert not net.training


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("hat-tiny-x22", "'hat-tiny-x22' is unknown. Did you mean 'hat-tiny-x2'"),
        ({"family": "hatt"}, "family 'hatt' is unknown. Did you mean 'hat'"),
        ({"family": "hat", "embed_dims": 3}, "no keyword 'embed_dims'. Did you mean 'embed_dim'"),
        ({"family": "hat", "upscale": 7}, "got 1, 7"),
        ({"family": "hat", "depths": "ab"}, "model 'hat': depths must be a list with a whole number per element"),
        ({"family": "plain-conv", "num_feat": 10**30}, "model 'plain-conv': empty()"),
        ({"family": "plain-conv", "upscale": 6}, "upscale must be 1, 2, 3, 4 or 8, got 6"),
        ({"family": "hat", 3: 4}, "no keyword 3"),
        ({"family": 3}, "family must be a name of `zoo list`, got 3"),
        ({"variant": ["hat-x2"]}, "variant must be a name of `zoo list`, got ['hat-x2']"),
        (3, "must be a name, or a mapping with `family` or `variant`, got 3"),
        ({"embed_dim": 3}, "needs `family` or `variant`"),
    ],
)
def test_create_names_what_is_wrong(model, message):
    with pytest.raises(UserError) as caught:
        create(model)
    assert message in str(caught.value)


def test_load_takes_a_state_dict_and_hidden_keywords():
    net = create({"variant": "hat-tiny-x2"})
    again = load(net.state_dict(), img_range=255.0, conv_scale=0.5, global_residual=True)
    assert (again.img_range, again.config["conv_scale"]) == (255.0, 0.5)
    with pytest.raises(UserError, match="embed_dim can be read off the weights"):
        load(net.state_dict(), embed_dim=3)


def test_load_finds_the_weights_of_a_run_folder(tmp_path):
    net, checkpoint = create(SMALL), tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"network.{k}": v for k, v in net.state_dict().items()}}, checkpoint)
    assert load(checkpoint).config["embed_dim"] == 4
    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors does not exist; a run writes it with its first"):
        load(tmp_path)  # never the weights that are trained in place of their average
    write_weights(tmp_path / "weights.safetensors", create(SMALL | {"embed_dim": 5}))
    assert load(tmp_path).config["embed_dim"] == 5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("conv_last.weight"), "1 missing (conv_last.weight)"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unexpected (extra)"),
        (lambda s: s.update({"conv_last.bias": torch.ones(4)}), "1 misshaped (conv_last.bias (4,), not (3,))"),
        (lambda s: s.pop("conv_first.weight"), "look like 'plain-conv' but lack"),
    ],
)
def test_unfit_state_dicts_say_which_tensors(spoil, message):
    state = create(SMALL).state_dict()
    spoil(state)
    with pytest.raises(UserError) as caught:
        load(state)
    assert message in str(caught.value)


def test_a_damaged_file_that_describes_itself_is_refused(tmp_path):
    net = create("hat-tiny-x2")
    state = net.state_dict()
    header = {"arch": "hat", "config": net.config}
    for spoilt, message in ((header, "1 missing (conv_first.bias)"), ({"arch": "hat"}, "wrongly"), ([], "wrongly")):
        save_file(
            {k: v for k, v in state.items() if k != "conv_first.bias"},
            tmp_path / "w.safetensors",
            metadata={"zoo": json.dumps(spoilt)},
        )
        with pytest.raises(UserError) as caught:
            load(tmp_path / "w.safetensors")
        assert message in str(caught.value)
    for key in ("arch", "config", "variant"):
        for value in (5, [1]):
            save_file(state, tmp_path / "w.safetensors", metadata={"zoo": json.dumps(header | {key: value})})
            with pytest.raises(UserError, match="wrongly"):
                load(tmp_path / "w.safetensors")
    for key in ("conv_before_upsample.0.weight", "layers.0.residual_group.blocks.0.conv_block.cab.0.weight"):
        for damage in ({}, {key: torch.tensor(1.0)}):
            others = {k: v for k, v in state.items() if k != key}
            save_file(others | damage, tmp_path / "w.safetensors", metadata={"zoo": json.dumps(header)})
            with pytest.raises(UserError, match=rf"1 m\w+ \({key}"):
                load(tmp_path / "w.safetensors")
    state = {k: v for k, v in state.items() if k != "conv_first.weight"}
    save_file(state, tmp_path / "w.safetensors", metadata={"zoo": json.dumps(header)})
    with pytest.raises(UserError, match=r"1 missing \(conv_first.weight\)"):
        load(tmp_path / "w.safetensors")


@pytest.mark.parametrize(("name", "key"), [("hat-tiny-x2", "index_OCA"), ("craft-tiny-x2", "index_v")])
def test_missing_or_damaged_index_tables_are_made_anew(name, key):
    net = create(name)
    made = net.state_dict()[f"relative_position_{key}"]
    others = {k: v for k, v in net.state_dict().items() if not k.endswith(key)}
    for damage in ({}, {f"relative_position_{key}": made - 1}):
        assert torch.equal(load(others | damage).state_dict()[f"relative_position_{key}"], made)


def test_unknown_weights_and_names_are_refused():
    with pytest.raises(UserError, match=r"^state dict: weights of no family of zoo \(hat, .*foo, .*see `zoo list`"):
        load({"foo": torch.ones(1)})
    with pytest.raises(UserError, match=r"neither a file nor a known model\. Did you mean 'hat-x4'"):
        load("hat-x5")
    with pytest.raises(FileNotFoundError, match="'hat-x4' are not shipped"):
        load("hat-x4")
    with pytest.raises(UserError, match="Linear is not a network of zoo"):
        needs(torch.nn.Linear(1, 1))


def test_what_a_file_holds_is_said_and_what_a_name_says_is_not(tmp_path, caplog):
    with caplog.at_level("INFO", "zoo"):
        network = load("plain-conv-tiny-x2")
        assert caplog.messages == []
        torch.save(network.state_dict(), tmp_path / "w.pth")
        load(tmp_path / "w.pth")
    assert caplog.messages == [f"weights {tmp_path / 'w.pth'}: plain-conv-tiny-x2"]


def test_a_bare_state_dict_of_a_variant_brings_back_what_weights_cannot_tell():
    for family, row in FAMILIES.items():
        variants = lookup(family).variants
        for name, (_, _, parameters) in row.variants.items():
            first = next(other for other in row.variants if variants[other] == variants[name])
            if first != name or parameters > 20_700_000:
                continue  # its twin came before, or it is a large size of what came before
            net = create(name)
            again = load({"params": net.state_dict()})
            assert (family_of(again), again.config, again.variant) == (family, net.config, name)
