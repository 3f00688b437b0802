"""Supervise a generative or representation model with a frozen DINOv2 teacher, at the speed of the hardware."""

from . import functional
from .backend import explain_backend, use_backend
from .losses import CosineLoss, MSELoss, VICRegLoss
from .preprocess import Preprocess
from .sizes import Area, Scaled
from .supervision import DinoSupervision
from .teacher import DINOv2Backbone
from .terms.projector import Projector

__version__ = "0.1.0"
__all__ = [
    "Area",
    "CosineLoss",
    "DINOv2Backbone",
    "DinoSupervision",
    "MSELoss",
    "Preprocess",
    "Projector",
    "Scaled",
    "VICRegLoss",
    "explain_backend",
    "functional",
    "use_backend",
]
