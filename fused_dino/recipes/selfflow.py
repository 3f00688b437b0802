"""Self-Flow: hidden tokens of mixed noise against those of the model's average at the lesser noise."""

from __future__ import annotations

from ..schedule import Schedule
from ..supervision import Supervision
from ..terms.tokens import TokenTerm
from .sra import self_projector


def selfflow(token_dim: int = 1152, *, alpha: float = 0.5) -> Supervision:
    """Returns Self-Flow's supervision: hidden tokens of mixed noise against the model's average at the lesser noise.

    Formula::

        loss = alpha * mean[b, n] (1 - cos(P(h[b, n]), e[b, n]))
        P    = Linear(C, 2C), SiLU, Linear(2C, C), Xavier-uniform with zero biases
        h    = hidden tokens [B, N, C] after block 8 of SiT-XL, where a quarter of the tokens has noise s, the rest t
        e    = those of an EMA after block 20, without P, where all tokens have noise min(s, t)

    Projector, blocks and the share of a quarter are of the authors' code, which samples only. The cosine and alpha are
    of others: SimpleTuner, and the code of arXiv 2607.02508. The paper's own weight was not checked.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        alpha (float): Weight of the loss. Default: 0.5.

    Returns:
        Supervision: Of one term, ``"token"``, without a teacher. Its log is one minus the mean cosine.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = selfflow(48)
        >>> hidden, ema = torch.randn(2, 256, 48, requires_grad=True), torch.randn(2, 256, 48)
        >>> losses = supervision.loss_dict(students={"token": hidden}, targets={"token": ema})

    Source: Chefer et al., arXiv 2603.06507; github.com/black-forest-labs/Self-Flow, src/model.py and README.md.
    """
    term = TokenTerm(token_dim, projector=self_projector(token_dim), out_dim=token_dim)
    return Supervision(None, {"token": term}, Schedule(alpha, 0))
