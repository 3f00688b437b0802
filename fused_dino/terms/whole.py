"""The term of the global token: one latent an image against one feature of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..features import Features
from ..live import dtype_of
from ..validation import check_int
from .base import Alignment, Parts
from .masks import blank
from .projector import Projector


class GlobalTerm(Alignment):
    r"""Aligns a latent of each image with the teacher's global token.

    .. math:: L(P(z), g)

    Args:
        in_dim (int): Width C of the latent. Default: 8192.
        projector (nn.Module, optional): A module [B, C] -> [B, D]. Default: ``Projector(in_dim, hidden_dim, D)``.
        hidden_dim (int): Hidden width of that projector. Default: 4096.
        out_dim (int, optional): Width D of the teacher's features. Default: read from the supervision's teacher.
        loss (str or nn.Module): ``"cosine"``, ``"mse"`` (normalised), ``"vicreg"``, or a module
            (student [B, D], target [B, D]) -> scalar. Default: ``"cosine"``.
        eps (float, optional): Smallest norm that divides, in place of the loss's own 1e-12; VICReg adds it to a
            variance, in place of 1e-4. A larger one, such as 1e-3, lets a projector learn that starts at zero.
        weight (float): Factor of the term in its supervision's sum. Default: 1.
        normalize_weight (bool): Divides by the sum of a call's weights; False by the number of images, as a gate by
            noise level wants. Default: ``True``.
        backend (str, optional): Default: see ``use_backend``.
        layer (int or sequence of ints, optional): The teacher's layer that is the target, by its number in the
            backbone's ``layers``; several are summed, as RAEv2 sums the last k. Default: the last features.
        teacher (str, optional): Name of the teacher, of several. Default: the one without a name.

    Shape:
        - student: :math:`(B, C)`; weight, of a call: :math:`(B)`
        - Output: a scalar, and the logs value, with VICReg vic_inv, vic_var and vic_cov

    Raises:
        ValueError: If an argument is out of range. The message names it.
        TypeError: If an argument is of a wrong type.

    Example:
        >>> term = GlobalTerm(in_dim=8, hidden_dim=16, out_dim=4)
        >>> loss, logs = term(torch.randn(2, 8), {"global": torch.randn(2, 4)})
        >>> list(logs)
        ['value']
    """

    def __init__(
        self,
        in_dim: int = 8192,
        *,
        projector: nn.Module | None = None,
        hidden_dim: int = 4096,
        out_dim: int | None = None,
        loss: str | nn.Module = "cosine",
        eps: float | None = None,
        weight: float = 1.0,
        normalize_weight: bool = True,
        backend: str | None = None,
        layer: int | Sequence[int] | None = None,
        teacher: str | None = None,
    ) -> None:
        super().__init__(
            projector,
            out_dim=out_dim,
            loss=loss,
            eps=eps,
            weight=weight,
            normalize_weight=normalize_weight,
            backend=backend,
            layer=layer,
            teacher=teacher,
        )
        self.in_dim, self.hidden_dim = check_int("in_dim", in_dim), check_int("hidden_dim", hidden_dim)
        if self.out_dim is not None:
            self.build(self.out_dim)

    def build(self, width: int) -> None:
        """Make the projector, unless a module was given."""
        if self.projector is None:
            self.projector = Projector(self.in_dim, self.hidden_dim, width)

    def check(  # type: ignore[override]
        self, name: str, student: Any, batch: int, *, weight: Any = None
    ) -> None:
        """Check the latents [B, in_dim] and the weights [B]."""
        check_latents(name, student, self.in_dim)
        super().check(name, student, batch)
        self.check_weight(weight, (batch,))

    def align(
        self, parts: Parts, student: Tensor, features: Features, weight: Tensor | None = None, *, scale: Any = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute what forward does, with other parts."""
        features = self.choose(features)
        student = blank(student, weight).to(dtype_of(parts.projector) or student.dtype)
        return self.compare(parts, parts.projector(student), features["global"], weight, scale)


def check_latents(name: str, latents: Any, in_dim: int) -> None:
    """Check latents [B, in_dim]."""
    if not isinstance(latents, Tensor):
        raise TypeError(f"{name} must be a tensor [B, {in_dim}], got {type(latents).__name__}")
    if latents.ndim != 2 or latents.shape[1] != in_dim or not latents.is_floating_point():
        raise ValueError(f"{name} must be floats of shape [B, {in_dim}], got {latents.dtype} of {list(latents.shape)}")
