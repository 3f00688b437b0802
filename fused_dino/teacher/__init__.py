"""The teacher, which makes features of images."""

from .backbone import DINOv2Backbone

__all__ = ["DINOv2Backbone"]
