"""The wing of the terms: a student's tensors and the teacher's features become a loss and its logs."""

from .base import Term
from .projector import Projector
from .regions import RegionTerm
from .tokens import TokenTerm
from .whole import GlobalTerm

__all__ = ["GlobalTerm", "Projector", "RegionTerm", "Term", "TokenTerm"]
