"""REPA: representation alignment of a denoiser's hidden tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..legacy_checkpoint import Legacy
from ..losses import CosineLoss
from ..schedule import Schedule
from ..supervision import Supervision
from ..teacher import DINOv2Backbone
from ..terms.tokens import TokenTerm
from ..validation import check_int


class NegativeCosine(CosineLoss):
    """Minus the cosine similarity, as REPA's code has it: one less than CosineLoss, with its gradient."""

    def forward(
        self, student: Tensor, target: Tensor, weight: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Return minus the mean similarity of rows [..., D], and 0 where all weights are 0."""
        loss = super().forward(student, target, weight, index)
        return loss - (1 if weight is None else (weight != 0).any().to(loss))

    def similarity(self, loss: Tensor) -> Tensor:
        """Return the mean similarity that a loss means."""
        return super().similarity(loss) - 1


def initialise(module: nn.Module) -> None:
    """Give a linear layer the first values that REPA's code gives it."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def repa(
    token_dim: int = 1152, *, teacher: str | nn.Module = "vitb14", resolution: int = 256, alpha: float = 0.5
) -> Supervision:
    r"""Returns REPA's supervision: hidden tokens against a teacher's patch tokens, by cosine.

    .. math:: loss = -\alpha \operatorname{mean}_{b,n} \cos(P(h_{bn}), g_{bn})

    P is Linear, SiLU, Linear, SiLU, Linear with 2048 features inside, Xavier-uniform with zero biases, of the tokens
    after block 8. The paper and the code agree in :math:`\alpha = 0.5`. Images of R x R pixels are resized to
    224 (R // 256), bicubic without antialias; positions are resampled as timm does. Its ``projectors.0.*`` load.

    Args:
        token_dim (int): Width of a hidden token. Default: 1152, of SiT-XL.
        teacher (str or nn.Module): As in Supervision; a name gets REPA's size and positions. Default: ``"vitb14"``.
        resolution (int): Side R of the images, at least 256. Default: 256.
        alpha (float): Weight of the loss, from the first step on. Default: 0.5.

    Returns:
        Supervision: Of one term, ``"token"``.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = repa(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> out = supervision.loss_dict(torch.zeros(2, 3, 256, 256), {"token": torch.randn(2, 256, 48)})

    Source: Yu et al., arXiv 2410.06940; github.com/sihyun-yu/REPA, loss.py and train.py.
    """
    if check_int("resolution", resolution) < 256:
        raise ValueError(f"resolution must be at least 256, from which REPA's teacher has an input, got {resolution}")
    size = 224 * (resolution // 256)
    if isinstance(teacher, str):
        teacher = DINOv2Backbone(teacher, size, pos_embed="timm")
    term: Any = TokenTerm(token_dim, loss=NegativeCosine(detach_teacher=False))
    supervision = Supervision(teacher, {"token": term}, Schedule(alpha, 0), img_size=size, preprocess="bicubic")
    term.projector.apply(initialise)
    supervision.legacy = Legacy("REPA", {"projectors.0": "terms.token.projector"})
    return supervision
