import hashlib

import pytest

from zoo import shipped
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


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no folder 'nothing'"):
        shipped.folder("nothing")
