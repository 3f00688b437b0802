"""The terms: each makes a loss and logs of a student's tensor and the teacher's features."""

from .base import Term
from .projector import Projector
from .regions import RegionTerm
from .tokens import TokenTerm
from .whole import GlobalTerm

__all__ = ["GlobalTerm", "Projector", "RegionTerm", "Term", "TokenTerm"]
