"""cosine_loss, the same with an index, and mse_loss."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_dino import functional as FD
from fused_dino.ops import cosine_triton
from fused_dino.ops.cosine_triton import RowOptions, cosine_rows
from fused_dino.reference.cosine import reduce, take_rows
from proving import Case, Op


def cosine_scales(
    student: Tensor, target: Tensor, grad_output: Tensor, *, eps: float = 1e-12, reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the units: a row's distance is at most two, and its gradient is that of the distance over the norm."""
    distance = torch.full(student.shape[:-1], 2.0, dtype=torch.float64, device=student.device, requires_grad=True)
    value = reduce(distance, weight, reduction)
    (grad,) = torch.autograd.grad(value, distance, grad_output.double())
    # A norm whose square leaves the range is infinite.
    norms = (x.double().norm(dim=-1).clamp(eps, 1e154) for x in (student, target))
    student_grad, target_grad = ((grad.abs() / norm).unsqueeze(-1) for norm in norms)
    return value.detach(), student_grad, target_grad


def mse_scales(
    student: Tensor, target: Tensor, grad_output: Tensor, *, normalize: bool = True, norm_eps: float = 1e-12,
    reduction: str = "mean", weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the units: the value sums squares of differences, and the gradient their derivatives.

    The gradient of a normalised row is over its norm, and each element has an error of the whole row.
    """
    s, t = (x.double() for x in (student, target))
    norms = [x.norm(dim=-1, keepdim=True).clamp(norm_eps, 1e154) if normalize else torch.ones_like(x) for x in (s, t)]
    sizes = sum(x.abs() / norm for x, norm in zip((s, t), norms, strict=True)).requires_grad_()
    value = reduce(sizes.square(), None if weight is None else weight.unsqueeze(-1), reduction)
    (grad,) = torch.autograd.grad(value, sizes, grad_output.double())
    grad = grad.norm(dim=-1, keepdim=True) if normalize else grad.abs()
    return value.detach(), grad / norms[0], grad / norms[1]


def forward_arguments(kind: str, student: Tensor, target: Tensor) -> tuple:
    """Return the arguments of cosine_rows for the loss alone."""
    return student, target, None, None, None, None, *RowOptions(kind, "sum", len(student), 1e-12)


def backward_arguments(kind: str, student: Tensor, target: Tensor, loss: Tensor, *outputs: Tensor) -> tuple:
    """Return the arguments of cosine_rows for both gradients."""
    options = RowOptions(kind, "sum", len(student), 1e-12, student_grad=True, target_grad=True)
    return student, target, None, None, None, loss.expand(len(student)), *options


def index_of(student: Tensor) -> Tensor:
    """Return positions [B, M] in a target of M - 1 rows: each of them, and some of them more than once."""
    batch, rows = student.shape[:2]
    return (2 * torch.arange(batch * rows, device=student.device) + 1).view(batch, rows) % (rows - 1)


def indexed(student: Tensor, target: Tensor, *, reduction: str = "none", **options: Any) -> Tensor:
    """Return the loss of rows [B, M, D] against some rows of the target. The first row of each image has none."""
    index = index_of(student)
    return FD.cosine_loss(student, target.detach()[:, 1:], index=index, reduction=reduction, **options)


def indexed_scales(
    student: Tensor, target: Tensor, grad_output: Tensor, *, reduction: str = "none", **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    target = take_rows(target[:, 1:], index_of(student))
    return cosine_scales(student, target, grad_output, reduction=reduction, **options)


def indexed_arguments(student: Tensor, target: Tensor, *outputs: Tensor) -> tuple:
    """Return the arguments of cosine_rows for the loss, or after it for the student's gradient."""
    rows = student.flatten(0, 1)
    grad_output = outputs[0].expand(len(rows)) if outputs else None
    options = RowOptions("cosine", "sum", len(rows), 1e-12, student_grad=bool(outputs))
    return rows, target[:, 1:], index_of(student), None, None, grad_output, *options


COSINE = Op(
    "cosine_loss",
    FD.cosine_loss,
    (
        Case((3, 16), "a power of two, narrower than any block"),
        Case((5, 37), "no power of two: a masked tail"),
        Case((4, 1), "one column: every cosine is 1 or -1"),
        Case((1, 300), "one row"),
        Case((2, 3, 24), "tokens: two leading dimensions"),
        Case((7,), "a single vector"),
        Case((3, 1000), "wider than the narrowest block"),
        Case((2, 5000), "wider than the widest block: the loop over columns"),
        Case((2, 16384), "the widest that is promised"),
        Case((400, 5), "more rows than are taken at a time on a CPU", closed_form=True),
        Case((cosine_triton.MANY_ROWS + 4, 3), "so many rows that a program takes several"),
        Case((6, 20), "summed", {"reduction": "sum"}),
        Case((6, 20), "one value a row", {"reduction": "none"}),
        Case((6, 20), "an eps above some norms and below others", {"eps": 4.5}),
    ),
    scales=cosine_scales,
    rowwise=True,
    forward=cosine_rows.overload,
    backward=cosine_rows.overload,
    forward_arguments=partial(forward_arguments, "cosine"),
    backward_arguments=partial(backward_arguments, "cosine"),
)
INDEXED = Op(
    "cosine_loss(index)",
    indexed,
    (
        Case((2, 5, 37), "no power of two: a masked tail"),
        Case((1, 2, 300), "one position"),
        Case((2, 3, 5000), "wider than the widest block: the loop over columns"),
        Case((2, 150, 5), "more rows than are taken at a time on a CPU", closed_form=True),
        Case((4, cosine_triton.MANY_ROWS // 4 + 1, 3), "so many rows that a program takes several"),
        Case((2, 4, 20), "averaged", {"reduction": "mean"}),
        Case((2, 4, 20), "summed", {"reduction": "sum"}),
        Case((2, 4, 20), "an eps above some norms and below others", {"eps": 4.5}),
    ),
    scales=indexed_scales,
    forward=cosine_rows.overload,
    backward=cosine_rows.overload,
    forward_arguments=indexed_arguments,
    backward_arguments=indexed_arguments,
    frozen=("target",),
    shape=lambda rows, width: (rows, 3, width),
    part_of="cosine_loss",
)
MSE = Op(
    "mse_loss",
    FD.mse_loss,
    (
        Case((5, 37), "no power of two: a masked tail"),
        Case((4, 1), "one column: every error is 0 or 4"),
        Case((2, 3, 24), "tokens: two leading dimensions"),
        Case((7,), "a single vector"),
        Case((2, 5000), "wider than the widest block: the loop over columns"),
        Case((400, 5), "more rows than are taken at a time on a CPU", closed_form=True),
        Case((6, 20), "summed", {"reduction": "sum"}),
        Case((6, 20), "one value an element", {"reduction": "none"}),
        Case((2, 5000), "one value an element, in a loop over columns", {"reduction": "none"}),
        Case((6, 20), "a norm_eps above some norms and below others", {"norm_eps": 4.5}),
        Case((5, 37), "rows as they are", {"normalize": False}),
        Case((5, 37), "elements as they are", {"normalize": False, "reduction": "none"}),
    ),
    scales=mse_scales,
    rowwise=True,
    forward=cosine_rows.overload,
    backward=cosine_rows.overload,
    forward_arguments=partial(forward_arguments, "mse"),
    backward_arguments=partial(backward_arguments, "mse"),
)
