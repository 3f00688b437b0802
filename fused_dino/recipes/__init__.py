"""Published definitions by name: each composes the terms of this package by the constants of its source."""

from .repa import repa
from .seed import seed

__all__ = ["repa", "seed"]
