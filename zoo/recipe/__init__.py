"""Recipes: one YAML file says which network learns what from which data.

The schema is Lightning's (`model`, `data`, `trainer`, `seed_everything`; classes by short name) with five keys of ours:
`_base` names one file that this one is laid over, `tracking` is auto, csv or wandb, `checkpoint_every` counts steps,
`vars` holds values to interpolate, `smoke` is what a two-step trial changes. In files, `key+:` appends to the base's
list, `key=:` replaces a mapping, and another `class_path`, `family` or `variant` than the base's starts without its
arguments.
"""

from zoo.recipe.building import Built, Checked, build, check, sketch, validate
from zoo.recipe.reading import Recipe, listing, resolve

__all__ = ["Built", "Checked", "Recipe", "build", "check", "listing", "resolve", "sketch", "validate"]
