"""Supervise a generative or representation model with a frozen DINOv2 teacher, at the speed of the hardware."""

from . import functional, recipes
from .backend import explain_backend, use_backend
from .losses import CosineLoss, MSELoss, VICRegLoss
from .preprocess import Preprocess
from .recipes.dino_supervision import DinoSupervision
from .schedule import AtStep, BySimilarity, Schedule, Weight
from .sizes import Area, Scaled
from .supervision import Supervision
from .teacher import DINOv2Backbone
from .terms import GlobalTerm, Projector, RegionTerm, Term, TokenTerm

__version__ = "0.1.0"
__all__ = [
    "Area", "AtStep", "BySimilarity", "CosineLoss", "DINOv2Backbone", "DinoSupervision", "GlobalTerm", "MSELoss",
    "Preprocess", "Projector", "RegionTerm", "Scaled", "Schedule", "Supervision", "Term", "TokenTerm", "VICRegLoss",
    "Weight", "explain_backend", "functional", "recipes", "use_backend",
]  # fmt: skip
