import importlib

from zoo.models.plugins import METHODS


def test_every_method_is_where_the_table_says():
    for title, (module, settings) in METHODS.items():
        found = importlib.import_module(f"zoo.models.plugins.{module}")
        assert getattr(found, settings).plugin.title == title
        assert all(isinstance(config, getattr(found, settings)) for config in found.VARIANTS.values())
