"""The wing of the teacher: images become features."""

from .backbone import DINOv2Backbone

__all__ = ["DINOv2Backbone"]
