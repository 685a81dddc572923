"""A model zoo for generating and restoring images and video on PyTorch + Lightning."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.models import create, list_models, load
    from zoo.models.plugins.plugin import applied, apply
    from zoo.pipelines.restoring import restore

__version__ = "0.1.0"
__all__ = ["__version__", "applied", "apply", "create", "list_models", "load", "restore"]

_EXPORTS = {  # imported on first use: torch takes seconds
    "applied": "zoo.models.plugins.plugin",
    "apply": "zoo.models.plugins.plugin",
    "create": "zoo.models",
    "list_models": "zoo.models",
    "load": "zoo.models",
    "restore": "zoo.pipelines.restoring",
}


def __getattr__(name: str) -> object:
    """The public functions."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *_EXPORTS})
