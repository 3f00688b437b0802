"""iREPA: REPA with a convolution as projector, and targets that are standardised over space."""

from __future__ import annotations

from typing import Any

from ..legacy_checkpoint import Legacy
from ..supervision import Supervision
from ..terms.token_projectors import TokenConv
from .repa import PROJECTOR, Teacher, cosine_term, of_repas_images, repas_teacher

LEGACY = Legacy("iREPA", {"projectors.0.projection_layer": PROJECTOR})


def irepa(
    token_dim: int = 1152, *, teacher: Teacher = "vitb14", kernel: int = 3, standardize: float = 0.6,
    alpha: float = 1.0, resolution: int = 256, **options: Any,
) -> Supervision:  # fmt: skip
    """Returns iREPA's supervision: convolved hidden tokens against patch tokens standardised over space, by cosine.

    Formula::

        loss = -alpha * mean[b, n] cos(P(h)[b, n], t[b, n]), norms clamped at 1e-12
        t    = (g - standardize * mean[n] g) / (std[n] g + 1e-6) of each image and channel, std by N - 1
        P    = Conv2d(C, D, kernel, padding=kernel // 2) over the grid of tokens, with torch's first values
        h    = hidden tokens [B, N, C] after block 8, 4 of SiT-B and JiT-B; g = patch tokens [B, N, D]

    Images of R x R, normalised for the teacher, are resized to 224 * (R // 256), bicubic without antialias; g has the
    teacher's last norm. Checkpoints with ``projectors.0.projection_layer.*`` load.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        teacher (str or nn.Module): A module or a name, whose positions are resampled as in timm. Default: ``"vitb14"``.
        kernel (int): Odd side of the convolution; the SiT code's own command leaves it at 1. Default: 3.
        standardize (float): Share of the mean that is taken away; 0.8 in JiT. Default: 0.6, of the SiT code.
        alpha (float): Weight of the loss; 0.5 in JiT. Default: 1.0, of the SiT code's irepa.yaml.
        resolution (int): Side R of the images, at least 256. Default: 256.
        **options: Of Supervision, such as ``input_range``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is minus the mean cosine.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = irepa(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> losses = supervision.loss_dict(torch.zeros(2, 3, 256, 256), {"token": torch.randn(2, 256, 48)})

    Source: Singh et al., arXiv 2512.10794; github.com/End2End-Diffusion/iREPA, ldm/ and jit/.
    """
    model, size = repas_teacher(token_dim, teacher, resolution)
    term = cosine_term(token_dim, TokenConv(token_dim, model.embed_dim, kernel), standardize=standardize, unbiased=True)
    return of_repas_images(term, model, size, alpha, LEGACY, **options)
