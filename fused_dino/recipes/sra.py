"""SRA: hidden tokens of an early layer against those that the model's own average has in a later layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..schedule import Schedule
from ..supervision import Supervision
from ..terms.comparison import LOSSES
from ..terms.tokens import TokenTerm
from ..validation import check_choice, check_int
from .repa import initialise


class SmoothL1(nn.Module):
    """Smooth L1 of rows in float32, or float64 for float64: a parabola up to beta, and a line beyond."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        """Return the mean over all elements."""
        dtype = torch.promote_types(torch.promote_types(student.dtype, target.dtype), torch.float32)
        return F.smooth_l1_loss(student.to(dtype), target.to(dtype), beta=self.beta)


def self_projector(width: int) -> nn.Sequential:
    """Return the head of SRA's code and of Self-Flow's, which keeps a token's width."""
    check_int("token_dim", width)
    return nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)).apply(initialise)


def sra(token_dim: int = 1152, *, loss: str | nn.Module = "smooth_l1", alpha: float = 0.2) -> Supervision:
    """Returns SRA's supervision: early hidden tokens against later ones of the model's average, at less noise.

    Formula::

        loss = alpha * mean[b, n, c] f(P(h[b, n]) - e[b, n])
        f(x) = x^2 / 0.1 where |x| < 0.05, else |x| - 0.025
        P    = Linear(C, 2C), SiLU, Linear(2C, C), Xavier-uniform with zero biases
        h    = hidden tokens [B, N, C] after block 8 of SiT-XL at noise t
        e    = those of an EMA (decay 0.9999) after block 20, without P, at noise max(0, t - 0.2 u), u uniform in 0..1

    Both passes share noise and labels. Blocks are 8 and 16 for DiT-XL, 4 and 8 by default. From epoch 150 on at 256
    pixels the code multiplies alpha by 0.1 ** ((epoch - 149) / 1000). That is a schedule whose weight has
    ``decay="exponential"``; here the weight is constant.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        loss (str or nn.Module): ``"smooth_l1"``, the paper's, or as in TokenTerm. Default: ``"smooth_l1"``.
        alpha (float): Weight of the loss; DiT's is 0.04, and 0.5 with the cosine. Default: 0.2.

    Returns:
        Supervision: Of one term, ``"token"``, without a teacher. Its log is the loss without alpha.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = sra(48)
        >>> hidden, ema = torch.randn(2, 256, 48, requires_grad=True), torch.randn(2, 256, 48)
        >>> losses = supervision.loss_dict(students={"token": hidden}, targets={"token": ema})

    Source: Jiang et al., arXiv 2505.02831; github.com/vvvvvjdy/SRA, SiT-SRA/loss.py and train.py.
    """
    if isinstance(loss, str):
        check_choice("loss", loss, ("smooth_l1", *LOSSES))
    made = SmoothL1(0.05) if loss == "smooth_l1" else loss
    term = TokenTerm(token_dim, projector=self_projector(token_dim), out_dim=token_dim, loss=made)
    return Supervision(None, {"token": term}, Schedule(alpha, 0))
