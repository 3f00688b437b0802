"""The arguments of DinoSupervision that no term checks: its loss by name, its latents and its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..losses import CosineLoss, MSELoss, VICRegLoss
from ..terms.whole import check_latents
from ..validation import check_choice, check_flag, check_group, is_int, plain_int

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def make_loss(
    loss_type: str | nn.Module, stopgrad_image: bool, group: ProcessGroup | str | None, backend: str | None
) -> nn.Module:
    check_group(group, auto=True)
    if isinstance(loss_type, nn.Module):
        if isinstance(loss_type, VICRegLoss) and group != "auto":
            raise ValueError("group belongs to the loss where loss_type is a module: VICRegLoss(group=...)")
        if not stopgrad_image and getattr(loss_type, "detach_teacher", False):
            raise ValueError("stopgrad_image=False needs a loss_type with detach_teacher=False")
        return loss_type
    options: dict[str, Any] = {"detach_teacher": stopgrad_image, "backend": backend}
    check_choice("loss_type", loss_type, ("cosine", "mse", "vicreg"))
    if loss_type == "vicreg":
        return VICRegLoss(group=group, **options)
    return CosineLoss(**options) if loss_type == "cosine" else MSELoss(**options)


def check_z_text(z_text: Any, in_dim: int | None) -> None:
    """Check latents [B, in_dim] of a supervision that was constructed with this in_dim."""
    if in_dim is None:
        raise ValueError("z_text must be left out: in_dim=None leaves it no projector; construct with its width")
    if z_text is None:
        raise ValueError(f"z_text must be a tensor [B, {in_dim}], got None, and no tokens in its place")
    check_latents("z_text", z_text, in_dim)


def check_token_dim(token_dim: Any, projector: Any, token_grid: Any, standardize: bool) -> int | None:
    """Check token_dim and the options that need it."""
    check_flag("token_standardize", standardize)
    if token_dim is None:
        if projector != "mlp" or token_grid is not None or standardize:
            raise ValueError("token_dim must be given with token_projector, token_grid or token_standardize, got None")
        return None
    if not is_int(token_dim):
        raise ValueError(f"token_dim must be None or a positive int, got {token_dim!r}")
    return plain_int(token_dim)


def check_tokens(tokens: Any, token_dim: int | None) -> None:
    if tokens is None and token_dim is None:
        return
    if token_dim is None:
        raise ValueError("tokens must be left out: construct with token_dim=C to align tokens [B, N, C]")
    if tokens is None:
        raise ValueError(
            f"tokens must be given, floats of shape [B, N, {token_dim}]: the module was constructed with "
            f"token_dim={token_dim}"
        )
