"""Published definitions by name: each composes the terms of this package by the constants of its source."""

from .catalogue import find_missing
from .haste import haste
from .irepa import irepa
from .layersync import layersync
from .prx import prx
from .raev2 import raev2
from .reg import reg
from .repa import repa
from .repae import repae
from .seed import seed
from .selfflow import selfflow
from .sra import sra
from .vicreg import vicreg

__all__ = ["haste", "irepa", "layersync", "prx", "raev2", "reg", "repa", "repae", "seed", "selfflow", "sra", "vicreg"]


def __getattr__(name: str) -> object:
    raise AttributeError(find_missing(name) or f"module {__name__!r} has no attribute {name!r}")
