"""HASTE: REPA's alignment, which ends at a step."""

from __future__ import annotations

from typing import Any

from ..schedule import AtStep, Schedule, Weight
from ..supervision import Supervision
from .repa import Teacher, repa


def haste(
    token_dim: int = 1152, *, teacher: Teacher = "vitb14", alpha: float = 0.5, stop_step: int = 250_000, **options: Any
) -> Supervision:
    """Returns the feature part of HASTE's supervision: REPA up to a step, and an exact zero from it on.

    Formula::

        loss = -alpha * mean[b, n] cos(P(h[b, n]), g[b, n]) while step < stop_step, else 0
        P    = Linear(C, 2048), SiLU, Linear(2048, 2048), SiLU, Linear(2048, D), Xavier-uniform with zero biases
        h    = hidden tokens [B, N, C] after block 8; g = patch tokens [B, N, D]

    HASTE adds 0.5 times a cross-entropy of attention maps until the same step. That needs a term of attention maps,
    which is missing. The code counts optimizer steps. After the stop the teacher does not run.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        teacher (str or nn.Module): A module or a name, which gets REPA's size. Default: ``"vitb14"``.
        alpha (float): Weight of the loss up to the stop, the code's proj-coeff. Default: 0.5.
        stop_step (int): First step without the loss: 250,000 on ImageNet, 150,000 on COCO. Default: 250000.
        **options: Of repa, such as ``resolution``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is minus the mean cosine; ``dino_alpha`` tells of the stop.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = haste(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> images, hidden = torch.zeros(2, 3, 256, 256), torch.randn(2, 256, 48)
        >>> losses = supervision.loss_dict(images, {"token": hidden}, step=1000)  # your count of optimizer steps

    Source: Wang et al., arXiv 2505.16792; github.com/NUS-HPC-AI-Lab/HASTE, loss.py and train.py.
    """
    made = repa(token_dim, teacher=teacher, **options)
    made.schedule = Schedule(weight=Weight(alpha), stop=AtStep(stop_step))
    return made
