"""REPA-E: REPA for a denoiser and, through it, for its autoencoder."""

from __future__ import annotations

from typing import Any

from ..supervision import Supervision
from .repa import Teacher, repa


def repae(token_dim: int = 1152, *, teacher: Teacher = "vitb14", alpha: float = 0.5, **options: Any) -> Supervision:
    """Returns REPA-E's supervision: REPA's, which is called twice a step, for the autoencoder and for the denoiser.

    Formula::

        denoiser:    loss = -alpha * mean[b, n] cos(P(h[b, n]), g[b, n])
        autoencoder: loss = -1.5 * mean[b, n] cos(P(h'[b, n]), g[b, n]), with P and the denoiser frozen
        P    = Linear(C, 2048), SiLU, Linear(2048, 2048), SiLU, Linear(2048, D), Xavier-uniform with zero biases
        h    = hidden tokens [B, N, C] after block 8 of detached latents, h' of latents with a gradient
        g    = patch tokens [B, N, D]

    The weights are the code's and its README's: proj-coeff and vae-align-proj-coeff. Both calls share noise and
    timesteps. The autoencoder's is ``supervision(features=features, students={"token": h}, alpha=1.5)``.

    Args:
        token_dim (int): Width C of a hidden token. Default: 1152, of SiT-XL.
        teacher (str or nn.Module): A module or a name, which gets REPA's size. Default: ``"vitb14"``.
        alpha (float): Weight of the denoiser's loss. Default: 0.5.
        **options: Of repa, such as ``resolution``.

    Returns:
        Supervision: Of one term, ``"token"``, whose log is minus the mean cosine.

    Raises:
        ValueError: If an argument is out of range. The message names it.

    Example:
        >>> supervision = repae(48, teacher=DINOv2Backbone("vits14", pretrained=False))
        >>> features, hidden = supervision.encode(torch.zeros(2, 3, 256, 256)), torch.randn(2, 256, 48)
        >>> for_autoencoder, logs = supervision(features=features, students={"token": hidden}, alpha=1.5)
        >>> for_denoiser = supervision.loss_dict(features=features, students={"token": hidden.detach()})

    Source: Leng et al., arXiv 2504.10483; github.com/End2End-Diffusion/REPA-E, train_repae.py.
    """
    return repa(token_dim, teacher=teacher, alpha=alpha, **options)
