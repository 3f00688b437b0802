"""REG: REPA with the class token among the tokens."""

from __future__ import annotations

from typing import Any

from ..legacy_checkpoint import Legacy
from ..supervision import Supervision
from .repa import PROJECTOR, Teacher, cosine_term, initialise, of_repas_images, repas_teacher

LEGACY = Legacy("REG", {"projectors.0": PROJECTOR})


def reg(
    token_dim: int = 1152, *, teacher: Teacher = "vitb14", resolution: int = 256, alpha: float = 0.5, **options: Any
) -> Supervision:
    """Returns the alignment of REG: REPA's, with the class token as one more token.

    Formula::

        loss = -alpha * mean[b, n] cos(P(h[b, n]), g[b, n]) over 1 + N tokens, norms clamped at 1e-12
        P    = Linear(C, 2048), SiLU, Linear(2048, 2048), SiLU, Linear(2048, D), Xavier-uniform with zero biases
        h    = hidden tokens [B, 1 + N, C] after block 8 of SiT-XL and SiT-L, 4 of SiT-B, the class token first
        g    = the teacher's class token and patch tokens [B, 1 + N, D]

    REG also denoises the class token: 0.03 times its squared error is the model's loss, and no part of this. Images of
    R x R, normalised for the teacher, are resized to 224 * (R // 256), bicubic without antialias; positions are
    resampled as timm does. Checkpoints with ``projectors.0.*`` load.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        teacher (str or nn.Module): A module or a name, which gets this size. Default: ``"vitb14"``.
        resolution (int): Side R of the images, at least 256. Default: 256.
        alpha (float): Weight of the loss, proj-coeff of the code. Default: 0.5.
        **options: Of Supervision, such as ``input_range``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is minus the mean cosine of all tokens.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = reg(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 256, 256), {"token": torch.randn(2, 1 + 256, 48)})

    Source: Wu et al., arXiv 2507.01467; github.com/Martinser/REG, loss.py and train.py.
    """
    model, size = repas_teacher(token_dim, teacher, resolution)
    term = cosine_term(token_dim, "mlp", out_dim=model.embed_dim, class_token=True)
    term.projector.apply(initialise)
    return of_repas_images(term, model, size, alpha, LEGACY, **options)
