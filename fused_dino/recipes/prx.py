"""PRX: the alignment of Photoroom's text-to-image model with DINOv3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..schedule import Schedule
from ..supervision import Supervision
from ..teacher.factories import make_teacher
from ..terms.token_projectors import TokenMLP
from ..terms.tokens import TokenTerm
from ..validation import check_int
from .repa import NegativeCosine, Teacher


@dataclass(frozen=True)
class AsTokens:
    """Size rule: a patch of the teacher for each token of the student. pixels: a side of a token."""

    pixels: int

    def __call__(self, h: int, w: int, patch: int) -> tuple[float, float]:
        return h * patch / self.pixels, w * patch / self.pixels


def teacher_of_tokens(token_dim: int, teacher: Teacher, downsampling: int, layers: Sequence[int] = ()) -> Any:
    """Return a teacher with a patch for each token. A width that is none is refused before a teacher is loaded."""
    check_int("token_dim", token_dim)
    return make_teacher(teacher, AsTokens(check_int("downsampling", downsampling)), True, None, layers)


def prx(
    token_dim: int = 1792, *, teacher: Teacher = "vit_large_patch16_dinov3", downsampling: int = 16,
    alpha: float = 0.5, **options: Any,
) -> Supervision:  # fmt: skip
    """Returns the alignment of PRX: REPA with a DINOv3 at the grid of the tokens, for images of any aspect.

    Formula::

        loss = -alpha * mean[b, n] cos(P(h[b, n]), g[b, n]), norms clamped at 1e-8
        P    = Linear(C, D), SiLU, Linear(D, D), SiLU, Linear(D, D), with torch's first values
        h    = hidden tokens [B, N, C] after block 8 (layer_index 7, 0-based); g = patch tokens [B, N, D]

    Images are resized by patch / downsampling, so that both grids agree: 1 for DINOv3 and a Flux latent. Otherwise the
    code takes the nearest pixel, and this interpolates. Under token routing give ``index=`` of the visible tokens.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1792, of PRX-1.2B.
        teacher (str or nn.Module): As in Supervision; also dinov2_vitl14_reg. Default: ``"vit_large_patch16_dinov3"``.
        downsampling (int): Pixels a side of a token: 16, or 32 without an autoencoder. Default: 16.
        alpha (float): Weight of the loss, lambda_weight of the code. Default: 0.5.
        **options: Of Supervision; the code's images lie in ``input_range=(0, 1)``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is minus the mean cosine.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = prx(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 256, 256), {"token": torch.randn(2, 256, 48)})

    Source: Photoroom, github.com/Photoroom/PRX, prx/algorithm/repa.py and configs/yamls; REPA, arXiv 2410.06940.
    """
    model = teacher_of_tokens(token_dim, teacher, downsampling)
    projector = TokenMLP(token_dim, model.embed_dim, model.embed_dim)
    term = TokenTerm(token_dim, projector=projector, loss=NegativeCosine(eps=1e-8, detach_teacher=False))
    return Supervision(model, {"token": term}, Schedule(alpha, 0), **options)
