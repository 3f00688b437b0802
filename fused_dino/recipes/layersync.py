"""LayerSync: hidden tokens of an early layer against those of a later layer of the same forward."""

from __future__ import annotations

from torch import nn

from ..schedule import Schedule
from ..supervision import Supervision
from ..validation import check_int
from .repa import cosine_term


def layersync(token_dim: int = 1152, *, alpha: float = 0.2) -> Supervision:
    """Returns LayerSync's supervision: early hidden tokens against later ones of the same forward, by cosine.

    Formula::

        loss = -alpha * mean[b, n] cos(h[b, n], stop(k[b, n]))
        h    = hidden tokens [B, N, C] after block 8 of SiT-XL
        k    = hidden tokens [B, N, C] after block 16, without a gradient

    There is no projector and no teacher. Blocks and weight are of the command in the authors' README. The code's own
    default for the later block is 8, too, which would compare a layer with itself.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        alpha (float): Weight of the loss, reg-weight of the code. Default: 0.2.

    Returns:
        Supervision: Of one term, ``"token"``, without a teacher or parameters. Its log is minus the mean cosine.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = layersync(48)
        >>> early = torch.randn(2, 256, 48, requires_grad=True)
        >>> losses = supervision.loss_dict(students={"token": early}, targets={"token": early.exp()})

    Source: Haghighi et al., arXiv 2510.12581; github.com/vita-epfl/LayerSync, transport/transport.py.
    """
    check_int("token_dim", token_dim)
    term = cosine_term(token_dim, nn.Identity(), out_dim=token_dim)
    return Supervision(None, {"token": term}, Schedule(alpha, 0))
