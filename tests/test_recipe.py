from zoo import shipped
from zoo.recipe import Recipe, listing, resolve, validate


def test_the_public_functions_work_together_on_every_training_recipe():
    names = [name for name in shipped.recipes() if not name.startswith("evaluate/")]
    assert names
    for name in names:
        recipe = resolve(name)
        assert isinstance(recipe, Recipe)
        validate(recipe)
        validate(resolve(name, smoke=True))
        assert "class_path" in listing(recipe)
