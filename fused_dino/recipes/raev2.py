"""RAEv2's alignment: hidden tokens against the sum of a teacher's last layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..losses import MSELoss
from ..schedule import Schedule
from ..supervision import Supervision
from ..terms.source import check_layer
from ..terms.tokens import TokenTerm
from .prx import teacher_of_tokens
from .repa import Teacher

LAST_SEVEN = tuple(range(-7, 0))


def raev2(
    token_dim: int = 1440, *, teacher: Teacher = "vit_large_patch16_dinov3", layers: Sequence[int] = LAST_SEVEN,
    alpha: float = 0.5, **options: Any,
) -> Supervision:  # fmt: skip
    """Returns RAEv2's alignment: hidden tokens against the sum of a teacher's last layers, by squared error.

    Formula::

        loss = alpha * mean[b, n, d] (P(h[b, n]) - t[b, n])^2
        t    = sum[l in layers] g_l, each with the teacher's last norm
        P    = Linear(C, D), with torch's first values
        h    = hidden tokens [B, N, C] after block 8; g_l = patch tokens [B, N, D] after block l of the teacher

    The sum is the paper's; error, projector, block and alpha are the code's, which is off in its configurations. Its
    target is another: the mean of blocks 11, 13, ..., 23 by a norm without scale and bias, plus the last one's mean
    over positions. Images are resized to a patch for each 16 pixels.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1440, of the code's DiT.
        teacher (str or nn.Module): A module must give these layers. Default: ``"vit_large_patch16_dinov3"``.
        layers (sequence of ints): Blocks to sum, -1 is the last. Default: the last seven.
        alpha (float): Weight of the loss, repa_coeff of the code. Default: 0.5.
        **options: Of Supervision; the code's images lie in ``input_range=(0, 1)``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is the mean squared error.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = raev2(48, teacher=DINOv2Backbone("vits14", pretrained=False, layers=range(-7, 0)))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 256, 256), {"token": torch.randn(2, 256, 48)})

    Source: Singh et al., arXiv 2605.18324; github.com/nanovisionx/RAEv2, src/stage2/transport/transport.py.
    """
    model = teacher_of_tokens(token_dim, teacher, 16, check_layer(layers))
    loss = MSELoss(normalize=False, detach_teacher=False)
    term = TokenTerm(token_dim, projector=nn.Linear(token_dim, model.embed_dim), layer=layers, loss=loss)
    return Supervision(model, {"token": term}, Schedule(alpha, 0), **options)
