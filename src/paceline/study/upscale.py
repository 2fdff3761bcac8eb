"""Cost-expanded targets, for studies: see `paceline.models.upscale`. As a model's name: `upscaled:8b:default`."""

from paceline.models.upscale import SHAPES, Shape, UpscaledSource

__all__ = ["SHAPES", "Shape", "UpscaledSource"]
