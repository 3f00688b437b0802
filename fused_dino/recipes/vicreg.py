"""VICReg against a frozen teacher: a latent's invariance to the global token, its variance and its covariance."""

from __future__ import annotations

from typing import Any

from ..losses import VICRegLoss
from ..schedule import Schedule
from ..supervision import Supervision
from ..terms.whole import GlobalTerm
from .repa import Teacher


def vicreg(
    in_dim: int = 8192, *, teacher: Teacher = "vitl14", preset: str = "vicreg", both: bool = False, alpha: float = 1.0,
    **options: Any,
) -> Supervision:  # fmt: skip
    """Returns VICReg's supervision of a latent by a teacher's global token, with a published definition's constants.

    Formula::

        loss = alpha * (25 * inv + 25 * var + cov)
        inv  = mean[b, d] (x - g)^2
        var  = mean[d] relu(1 - sqrt(Var[b] x + 1e-4)) / 2, without the half in solo-learn
        cov  = sum[i != j] C[i, j]^2 / D, C = (x - mean[b] x)^T (x - mean[b] x) / (B - 1), Var by B - 1
        x    = P(z) [B, D] of latents z [B, C], P = Projector; g = global token [B, D]

    With ``both`` var and cov of g, which are constants here, are added to the value. preset="seed" weighs 25, 10 and
    0.5, and takes biased variances and the mean of squares over D^2.

    Args:
        in_dim (int): Width C of a latent. Default: 8192.
        teacher (str or nn.Module): As in Supervision. Default: ``"vitl14"``.
        preset (str): ``"vicreg"``, ``"lightly"``, ``"solo"`` or ``"seed"``. Default: ``"vicreg"``, the official code.
        both (bool): Counts the teacher's branch, too. Default: ``False``.
        alpha (float): Weight of the loss. Default: 1.0.
        **options: Of Supervision, such as ``input_range``.

    Returns:
        Supervision: Of one term, ``"global"``, whose logs are the loss and its three parts.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = vicreg(64, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 224, 224), {"global": torch.randn(2, 64)})

    Source: Bardes et al., arXiv 2105.04906; github.com/facebookresearch/vicreg, main_vicreg.py.
    """
    loss = VICRegLoss.preset(preset, both=both, detach_teacher=False)
    return Supervision(teacher, {"global": GlobalTerm(in_dim, loss=loss)}, Schedule(alpha, 0), **options)
