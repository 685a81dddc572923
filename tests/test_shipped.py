import hashlib

import pytest
import torch
import yaml

from zoo import models, shipped
from zoo.errors import UserError


def test_recipes_are_found_by_path_name_and_short_name():
    path = shipped.recipes()["train/hat-tiny-x2"]
    assert shipped.find_recipe(str(path)) == path
    assert shipped.find_recipe("train/hat-tiny-x2") == path
    assert shipped.find_recipe("recipes/train/hat-tiny-x2.yaml").resolve() == path
    assert shipped.find_recipe("hat-tiny-x2") == path


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'hat-tiny-x2'"):
        shipped.find_recipe("hat-tny-x2")


def test_bases_are_no_recipes():
    assert not [name for name in shipped.recipes() if "_base" in name]


def test_every_shipped_weight_is_there_and_is_what_the_index_says():
    described = {name: row for name, row in shipped.index().items() if "file" in row}
    for name, row in described.items():
        path = shipped.weight_file(name)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
        assert path.stat().st_size <= 6e6
        assert {"recipe", "licence", "figures"} <= set(row)
    total = sum(p.stat().st_size for p in shipped.folder("checkpoints").rglob("*") if p.is_file())
    assert total <= 48e6


def test_sizes_of_official_files_are_those_of_their_tensors():
    sizes = {name: row["size"] for name, row in shipped.index().items() if "size" in row}
    assert len(sizes) > 15
    for name, said in sizes.items():
        with torch.device("meta"):
            total = sum(tensor.nbytes for tensor in models.create(name).state_dict().values())
        sets = 2 if "-real" in name and name.startswith("hat") else 1  # with and without the average
        assert float(said.removesuffix(" MB")) == pytest.approx(sets * total / 1e6, rel=0.01, abs=0.5), name


def test_own_weights_that_are_not_shipped_say_how_they_are_trained(tmp_path, monkeypatch):
    index = tmp_path / "checkpoints" / "index.yaml"
    index.parent.mkdir()
    index.write_text("hat-tiny-x4: {source: zoo fit hat-tiny-x4}\nhat-x4: {source: somewhere (a.pth)}\n")
    monkeypatch.setattr(shipped, "index", lambda: yaml.safe_load(index.read_text()))
    with pytest.raises(FileNotFoundError, match="train them by `zoo fit hat-tiny-x4` and give the run"):
        models.load("hat-tiny-x4")
    with pytest.raises(FileNotFoundError, match=r"fetch them from somewhere \(a\.pth\) and give the file"):
        models.load("hat-x4")


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no folder 'nothing'"):
        shipped.folder("nothing")
