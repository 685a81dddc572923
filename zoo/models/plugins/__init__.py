"""Cheaper attention for denoisers that somebody already has: methods here, what they are put onto in `hosts`."""

METHODS = {  # class in config.json -> module of zoo.models.plugins, its settings
    "LinFusion": ("linfusion", "LinFusionConfig"),
    "CLEAR": ("clear", "ClearConfig"),
}
