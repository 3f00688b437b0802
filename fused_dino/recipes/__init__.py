"""Published definitions by name: each composes the terms of this package by the constants of its source."""

from .catalogue import find_missing
from .haste import haste
from .irepa import irepa
from .prx import prx
from .raev2 import raev2
from .repa import repa
from .repae import repae
from .seed import seed
from .vicreg import vicreg

__all__ = ["haste", "irepa", "prx", "raev2", "repa", "repae", "seed", "vicreg"]


def __getattr__(name: str) -> object:
    raise AttributeError(find_missing(name) or f"module {__name__!r} has no attribute {name!r}")
