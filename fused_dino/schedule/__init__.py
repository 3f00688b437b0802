"""When a supervision counts, and how much: the weight of its loss by the step, and what stops it."""

from .schedule import Schedule
from .stop import AtStep, BySimilarity
from .weight import Weight

__all__ = ["AtStep", "BySimilarity", "Schedule", "Weight"]
