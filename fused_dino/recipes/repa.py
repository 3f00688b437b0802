"""REPA: representation alignment of a denoiser's hidden tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..legacy_checkpoint import Legacy
from ..losses import CosineLoss
from ..schedule import Schedule
from ..supervision import Supervision
from ..teacher import DINOv2Backbone
from ..teacher.factories import make_teacher
from ..terms.base import Term
from ..terms.tokens import TokenTerm
from ..validation import check_int

Teacher = str | nn.Module
PROJECTOR = "terms.token.projector"  # in a supervision's checkpoint


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


def repas_teacher(token_dim: int, teacher: Teacher, resolution: int) -> tuple[Any, int]:
    """Return a teacher, one given by name with REPA's size and positions, and the side of its input.

    A width that is none is refused before a teacher is loaded.
    """
    check_int("token_dim", token_dim)
    if check_int("resolution", resolution) < 256:
        raise ValueError(f"resolution must be at least 256, from which REPA's teacher has an input, got {resolution}")
    size = 224 * (resolution // 256)
    if isinstance(teacher, str):
        teacher = DINOv2Backbone(teacher, size, pos_embed="timm")
    return make_teacher(teacher, size, True, None), size


def cosine_term(token_dim: int, projector: str | nn.Module, **options: Any) -> Any:
    return TokenTerm(token_dim, projector=projector, loss=NegativeCosine(detach_teacher=False), **options)


def of_repas_images(
    term: Term, teacher: nn.Module, size: int, alpha: float, legacy: Legacy, **options: Any
) -> Supervision:
    """Return a supervision of one term of tokens, by a constant weight, of images as REPA's teacher gets them."""
    made = Supervision(teacher, {"token": term}, Schedule(alpha, 0), img_size=size, preprocess="bicubic", **options)
    made.legacy = legacy
    return made


def repa(
    token_dim: int = 1152, *, teacher: Teacher = "vitb14", resolution: int = 256, alpha: float = 0.5, **options: Any
) -> Supervision:
    """Returns REPA's supervision: hidden tokens against a teacher's patch tokens, by cosine.

    Formula::

        loss = -alpha * mean[b, n] cos(P(h[b, n]), g[b, n]), norms clamped at 1e-12
        P    = Linear(C, 2048), SiLU, Linear(2048, 2048), SiLU, Linear(2048, D)
        h    = hidden tokens [B, N, C] after block 8 of SiT-XL and SiT-L, 4 of SiT-B; g = patch tokens [B, N, D]

    P begins Xavier-uniform with zero biases. Images of R x R, normalised for the teacher, are resized to
    224 * (R // 256), bicubic without antialias; positions are resampled as timm does; g has the teacher's last norm.
    Checkpoints with ``projectors.0.*`` load.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        teacher (str or nn.Module): As in Supervision; a name gets REPA's size and positions. Default: ``"vitb14"``.
        resolution (int): Side R of the images, at least 256. Default: 256.
        alpha (float): Weight of the loss; the paper and the code agree. Default: 0.5.
        **options: Of Supervision, such as ``input_range``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is minus the mean cosine.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = repa(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 256, 256), {"token": torch.randn(2, 256, 48)})

    Source: Yu et al., arXiv 2410.06940; github.com/sihyun-yu/REPA, loss.py and train.py.
    """
    model, size = repas_teacher(token_dim, teacher, resolution)
    term = cosine_term(token_dim, "mlp", out_dim=model.embed_dim)
    term.projector.apply(initialise)
    return of_repas_images(term, model, size, alpha, Legacy("REPA", {"projectors.0": PROJECTOR}), **options)
