import json

import pytest
import torch
import yaml
from PIL import Image

from zoo import shipped
from zoo.cli import main
from zoo.layers.vgg import VGG19
from zoo.recipe import resolve
from zoo.scene import parse


def test_recipes_are_listed_with_what_they_are_for(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name in shipped.recipes():
        assert name in out
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows.keys() == shipped.recipes().keys()
    assert all(rows.values()), "a recipe starts with a comment that says what it is"


def test_show_prints_the_resolved_recipe_and_where_each_line_comes_from(capsys):
    assert main(["show", "train/hat-tiny-x2", "seed_everything=7", "trainer.max_steps=3"]) == 0
    out = capsys.readouterr().out
    config = yaml.safe_load(out)
    assert config["data"]["init_args"]["seed"] == 7
    assert config["trainer"]["max_steps"] == 3
    assert "override 'trainer.max_steps=3'" in out
    assert "_base/restoration.yaml:" in out


def test_show_prints_json_and_the_smoke_version(capsys):
    assert main(["show", "train/hat-tiny-x2", "--smoke", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["data"]["init_args"]["workers"] == 0
    assert len(found["hash"]) == 64


def test_show_asks_the_signature_about_a_key_that_no_file_mentions(capsys):
    assert main(["show", "train/hat-tiny-x2", "trainer.gradient_clip_val=0.5"]) == 0
    assert "gradient_clip_val: 0.5" in capsys.readouterr().out
    assert main(["show", "train/hat-tiny-x2", "trainer.gradient_clip=0.5"]) == 2
    assert "Trainer takes no 'gradient_clip'. Did you mean 'gradient_clip_val'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "check", "fit"])
def test_an_unknown_recipe_offers_the_nearest(command, capsys):
    assert main([command, "hat-tny-x2"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean 'hat-tiny-x2'" in err
    assert err.count("\n") == 1


def test_a_recipe_for_evaluation_is_sent_there(capsys):
    assert main(["show", "evaluate/photos-x2"]) == 2
    assert "measure with `zoo evaluate evaluate/photos-x2`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg19-dcbb9e9d.pth"
    torch.save(VGG19().state_dict(), path)
    return path


@pytest.mark.parametrize("name", [name for name in shipped.recipes() if not name.startswith("evaluate/")])
def test_every_shipped_recipe_passes_its_check(name, capsys, request):
    known = resolve(name).config
    given = ["model.init_args.weights=null"] if "start" in known.get("vars", {}) else []  # of the stage before
    given += [f"vars.vgg={request.getfixturevalue('vgg')}"] if "vgg" in known.get("vars", {}) else []
    assert main(["check", name, *given, "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == 2
    assert report["parameters"] > 10_000


def test_a_mistake_in_a_recipe_is_one_line_with_its_place(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(f"_base: {shipped.recipes()['train/hat-tiny-x2']}\nmodel:\n  init_args: {{crop_boarder: 2}}\n")
    assert main(["check", str(path), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert err == f"zoo: {path}:3: RestorationTask takes no 'crop_boarder'. Did you mean 'crop_border'?\n"


def test_a_sheet_of_shapes_world_is_shown_with_its_captions(tmp_path, capsys):
    assert main(["show", "--data", "shapes", "--num", "8", "--out", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Image.open(said["file"]).width > 500
    assert [parse(caption.removeprefix("[unseen] ")).held_out for caption in said["captions"]] == [False] * 6 + [
        True
    ] * 2
    assert main(["show", "--data", "shapes", "--num", "8", "--out", str(tmp_path)]) == 2, "never overwritten"
    assert main(["show"]) == 2
    assert "name a recipe" in capsys.readouterr().err


def test_a_sheet_of_a_degradation_is_shown_with_and_without_a_recipe(tmp_path, capsys):
    assert main(["show", "--data", "rain", "--num", "2", "--size", "64", "--out", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"].endswith("rain.png")
    assert [caption.split()[0] for caption in said["captions"]] == ["rain", "rain"]
    first = Image.open(said["file"]).tobytes()
    command = ["show", "--data", "rain", "--num", "2", "--size", "64", "--out", str(tmp_path), "--force", "--quiet"]
    assert main([*command, "--seed", "0"]) == 0
    assert Image.open(said["file"]).tobytes() == first, "the same picture for the same seed"
    assert main([*command, "--seed", "1"]) == 0
    assert Image.open(said["file"]).tobytes() != first
    capsys.readouterr()
    settings = ["data.init_args.source=demo", "--num", "2", "--size", "64", "--out", str(tmp_path), "--json"]
    assert main(["show", "hat-tiny-x2", "data.init_args.degradation.0.init_args.quality=33", "--data", "jpeg", "--seed",
                 "3", "data.init_args.degradation.0.init_args.probability=1", *settings]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["captions"] == ["bicubic 1/2, jpeg 33"] * 2
    assert main(["show", "hat-tiny-x2", "--data", "train", *settings]) == 0
    assert len(json.loads(capsys.readouterr().out)["captions"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "train"], "--data train shows the data of a recipe"),
        (["hat-tiny-x2", "--data", "rain"], "these data have no step 'rain'; name train, or one of theirs: jpeg"),
        (["shapes-vae", "--data", "train"], "shapes-vae trains no restorer"),
        (["--data", "rain", "--num", "1000"], "--num must be 1 to 400"),
        (["--data", "rian"], "invalid choice: 'rian'"),
    ],
)
def test_a_sheet_that_cannot_be_is_one_sentence(words, said, tmp_path, capsys):
    assert main(["show", *words, "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
