"""The schedule of a supervision: the weight of its loss at each step, and what stops it."""

from .schedule import Schedule
from .stop import AtStep, BySimilarity
from .weight import Weight

__all__ = ["AtStep", "BySimilarity", "Schedule", "Weight"]
