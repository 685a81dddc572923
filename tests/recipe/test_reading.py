import subprocess
import sys

import pytest
import yaml

from zoo import shipped
from zoo.errors import UserError
from zoo.recipe.reading import listing, resolve

BASE = """\
seed_everything: 1
model:
  class_path: RestorationTask
  init_args:
    network: {family: hat, embed_dim: '${vars.width}'}
    objectives: [{class_path: L1}]
trainer:
  max_steps: 100
  callbacks:
    - class_path: EMA
vars: {width: 48}
smoke:
  trainer: {max_steps: 2}
"""
TOP = """\
# a recipe
_base: base.yaml
data: {class_path: RestorationData, init_args: {seed: "${seed_everything}"}}
trainer:
  callbacks+:
    - class_path: Previews
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes base.yaml and top.yaml into the working folder; returns the text of an error for another top.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "top.yaml").write_text(TOP)

    def error(text, *overrides):
        (tmp_path / "top.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            resolve("top.yaml", overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return error


def test_base_overrides_and_interpolations_come_together(recipe):
    found = resolve("top.yaml", ["vars.width=6", "seed_everything=3", "trainer.precision=bf16-mixed"])
    assert found.config["model"]["init_args"]["network"]["embed_dim"] == 6
    assert found.config["data"]["init_args"]["seed"] == 3
    assert [c["class_path"] for c in found.config["trainer"]["callbacks"]] == ["EMA", "Previews"]
    assert found.text == TOP
    assert found.where(("trainer", "max_steps")) == "base.yaml:8"
    assert found.where(("trainer", "callbacks", 1, "class_path")) == "top.yaml:6"
    assert found.where(("trainer", "precision")) == "override 'trainer.precision=bf16-mixed'"
    assert found.added == ("override 'trainer.precision=bf16-mixed'",)


def test_overrides_append_to_lists_too(recipe):
    found = resolve("top.yaml", ["trainer.callbacks+=[{class_path: LearningRateMonitor}]"])
    assert [c["class_path"] for c in found.config["trainer"]["callbacks"]] == ["EMA", "Previews", "LearningRateMonitor"]


def test_numbers_without_a_point_are_numbers(recipe):
    found = resolve("top.yaml", ["trainer.gradient_clip_val=2e-4", "trainer.max_time=null"])
    assert found.config["trainer"]["gradient_clip_val"] == 2e-4
    assert found.config["trainer"]["max_time"] is None


def test_smoke_lies_over_the_file_and_under_the_overrides(recipe):
    assert resolve("top.yaml").config["trainer"]["max_steps"] == 100
    small = resolve("top.yaml", smoke=True)
    assert small.config["trainer"]["max_steps"] == 2
    assert "smoke" not in small.config
    assert resolve("top.yaml", ["trainer.max_steps=3"], smoke=True).config["trainer"]["max_steps"] == 3
    assert resolve("top.yaml", ["smoke.trainer.max_steps=4"], smoke=True).config["trainer"]["max_steps"] == 4


def test_the_hash_follows_what_decides_the_result_and_nothing_else(recipe):
    plain = resolve("top.yaml").hash
    for same in ("tracking=csv", "checkpoint_every=7", "trainer.devices=2", "smoke.trainer.max_steps=9"):
        assert resolve("top.yaml", [same]).hash == plain, same
    for other in ("seed_everything=2", "trainer.max_steps=9", "vars.width=6"):
        assert resolve("top.yaml", [other]).hash != plain, other


def test_the_listing_is_a_recipe_that_says_the_same(recipe, tmp_path):
    found = resolve("top.yaml")
    text = listing(found)
    assert "max_steps: 100" in text.split("# base.yaml:8")[0].splitlines()[-1]
    (tmp_path / "again.yaml").write_text(text)
    again = resolve("again.yaml")
    assert (again.config, again.hash) == (found.config, found.hash)
    assert yaml.safe_load(text) == found.config


def test_every_shipped_recipe_resolves_also_in_its_smoke_version():
    names = [name for name in shipped.recipes() if not name.startswith("evaluate/")]
    assert names
    for name in names:
        assert resolve(name).config["model"]
        assert resolve(name, smoke=True).config["model"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1,\nb: 2\n", "top.yaml:3: not valid YAML: "),
        ("seed_everything: 1\nseed_everything: 2\n", "top.yaml:2: not valid YAML: found duplicate key seed_everything"),
        ("model: !!python/object:os.system 1\n", "top.yaml:1: not valid YAML: could not determine a constructor"),
        ("- a\n", "top.yaml:1: a recipe must be a mapping"),
        ("", "top.yaml:1: a recipe must be a mapping"),
        ("trainr: {max_steps: 1}\n", "top.yaml:1: a recipe has no key 'trainr'. Did you mean 'trainer'"),
        ("_base: [base.yaml]\n", "top.yaml:1: _base must name one file"),
        ("seed_everything: 1\n_base: bas.yaml\n", "top.yaml:2: _base names 'bas.yaml', but there is no file bas.yaml"),
        ("_base: top.yaml\n", "top.yaml: the _base files name each other in a circle (top.yaml -> top.yaml)"),
        (
            "vars:\n  a: ${vars.bb}\n  b: 1\n",
            "top.yaml:2: vars.a: ${vars.bb} names no key of the recipe. Did you mean 'vars.b'",
        ),
        ("vars: {a: '${vars.a}'}\n", "top.yaml:1: vars.a: the interpolation cannot be resolved: Recursive"),
        ("vars: {a: '${oc.env:NOT_SET_HERE}'}\n", "top.yaml:1: vars.a: the interpolation cannot be resolved"),
        ("vars: {a: '${broken'}\n", "top.yaml:1: vars.a: the interpolation cannot be resolved"),
        ("model: &a\n  b: *a\n", "top.yaml: the YAML refers to itself"),
        ("model: hat-tiny-x2\nupscale: 2\n", "top.yaml: this is no recipe for training; measure with `zoo evaluate"),
        ("smoke: 3\n", "top.yaml:1: smoke must be a mapping"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_its_place(recipe, text, said):
    assert said in recipe(text)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.max_steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("trianer.max_steps=3", "a recipe has no 'trianer'. Did you mean 'trainer'"),
        ("trainer.max_steps=[1", "the value is not valid YAML"),
        ("trainer.callbacks.7.class_path=EMA", "trainer.callbacks is a list of 2"),
        ("model.init_arg.network=x", "model has no 'init_arg'. Did you mean 'init_args'?"),
        ("vars.widht=3", "vars has no 'widht'. Did you mean 'width'?"),
        ("seed_everything=${nope}", "${nope} names no key of the recipe"),
    ],
)
def test_mistakes_in_an_override_name_it(recipe, override, said):
    message = recipe(TOP, override)
    assert message.startswith(f"override {override!r}: ")
    assert said in message


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "photo.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match=r"photo.yaml: this is no text file"):
        resolve(tmp_path / "photo.yaml")


def test_resolving_imports_no_torch():
    code = "import sys; from zoo.recipe import resolve; resolve('train/hat-tiny-x2'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=shipped.folder("recipes").parent)
