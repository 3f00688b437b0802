"""The recipe `seed`: the supervision of the code that DinoSupervision replaces."""

from __future__ import annotations

from torch import nn

from ..schedule import Schedule
from ..supervision import Supervision
from ..terms.whole import GlobalTerm


def seed(
    in_dim: int = 8192, *, teacher: str | nn.Module = "vitl14", loss: str | nn.Module = "cosine", alpha: float = 0.2
) -> Supervision:
    """Returns the seed's supervision of a latent: the code that people pasted into their trainers, as one term.

    Formula::

        loss = alpha * min(1, step / 5000) * L(P(z), g)
        L    = mean[b] (1 - cos), or the seed's normalised MSE or VICReg
        P    = Linear(C, 4096), GELU, LayerNorm(4096), Linear(4096, D)
        z    = latents [B, C]; g = the global token [B, D]

    Images are resized bilinearly to 224 x 224. DinoSupervision is the same with the seed's own names, and with regions.

    Args:
        in_dim (int): Width of the latent. Default: 8192.
        teacher (str or nn.Module): As in Supervision. Default: ``"vitl14"``.
        loss (str or nn.Module): As in GlobalTerm. Default: ``"cosine"``.
        alpha (float): Weight after the warm-up. Default: 0.2.

    Returns:
        Supervision: Of one term, ``"global"``.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = seed(64, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 64, 64), {"global": torch.randn(2, 64)})

    Source: the code that DinoSupervision replaces; negative cosine of SimSiam, arXiv 2011.10566, plus one.
    """
    return Supervision(teacher, {"global": GlobalTerm(in_dim, loss=loss)}, Schedule(alpha, 5000))
