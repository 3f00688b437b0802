"""One call of a loss on rows: its options, its scale, the weights of its rows, and its logs."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..functional import VICRegOutput
from ..losses import CosineLoss, MSELoss, VICRegLoss
from ..reference.dtypes import acc_dtype
from ..registry import OPS
from ..rows import rows_loss
from ..validation import check_choice

LOSSES = ("cosine", "mse", "vicreg")
OURS = (CosineLoss, MSELoss, VICRegLoss)  # a subclass may have a forward of its own


def make_loss(loss: str | nn.Module, eps: float | None, backend: str | None) -> nn.Module:
    """Return the loss of a name, or a module as it is. It does not detach: features that should be detached are."""
    if isinstance(loss, nn.Module):
        if eps is not None:
            raise ValueError("eps belongs to the loss where that is a module: CosineLoss(eps=...)")
        return loss
    check_choice("loss", loss, LOSSES)
    options: dict[str, Any] = {"detach_teacher": False, "backend": backend}
    if loss == "vicreg":
        return VICRegLoss(**options) if eps is None else VICRegLoss(eps=eps, **options)
    if loss == "mse":
        return MSELoss(**options) if eps is None else MSELoss(norm_eps=eps, **options)
    return CosineLoss(**options) if eps is None else CosineLoss(eps=eps, **options)


def accepts(loss: nn.Module, option: str) -> bool:
    """Whether a loss's forward takes an option of a call, such as weight or index."""
    return option in inspect.signature(type(loss).forward).parameters


def compare(
    loss: Any,
    student: Tensor,
    target: Tensor,
    scale: float | Tensor | None,
    *,
    weight: Tensor | None = None,
    normalize: bool = True,
    index: Tensor | None = None,
    name: str = "loss",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scale times the loss of rows [..., D], and logs: "value", the loss without scale, and VICReg's terms.

    weight: weights of rows, broadcastable. normalize: whether to divide by the sum of the weights, as the losses do, or
    by the number of rows. index: the row of the target for each row of the student. name: the argument's name for the
    loss, in errors. An op that takes `scale` applies the factor itself.
    """
    more: dict[str, Any] = {}
    share: Tensor | None = None
    if weight is not None:
        more["weight"] = weight
        if not normalize:
            share = weight.expand(student.shape[:-1]).to(acc_dtype(student, target)).mean()
    if index is not None:
        more["index"] = index
    if takes_scale(loss):
        factor = scale if share is None else (share if scale is None else share * scale)
        settings = {**loss.options, "scale": factor}
        target = target.detach() if loss.detach_teacher else target
        scaled, value = rows_loss(loss.op.__name__, student, target, more.pop("weight", None), **settings, **more)
        return scaled, {"value": value if share is None else value * share}
    out = loss(student, target, **more)
    value = out.loss if isinstance(out, VICRegOutput) else out
    if not isinstance(value, Tensor) or value.ndim:
        raise TypeError(f"{name} must return a scalar tensor, got {getattr(value, 'shape', type(value).__name__)}")
    value = value if share is None else value * share
    logs = {"value": value.detach()}
    if isinstance(out, VICRegOutput):
        logs.update(zip(("vic_inv", "vic_var", "vic_cov"), out[1:], strict=True))
    if scale is None:
        return value, logs
    return value * (scale.to(value) if isinstance(scale, Tensor) else scale), logs


def takes_scale(loss: Any) -> bool:
    return (
        type(loss) in OURS
        and OPS[loss.op.__name__].rowwise
        and loss.options["reduction"] != "none"
        and loss.options["scale"] is None
        and not (loss._forward_hooks or loss._forward_pre_hooks)
    )
