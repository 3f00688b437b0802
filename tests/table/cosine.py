"""cosine_loss and mse_loss."""

from functools import partial

import torch
from torch import Tensor

from fused_dino import functional as FD
from fused_dino.ops import cosine_triton
from fused_dino.ops.cosine_triton import RowOptions, cosine_rows
from fused_dino.reference.cosine import reduce
from proving import Case, Op


def cosine_scales(
    student: Tensor, teacher: Tensor, grad_output: Tensor, *, eps: float = 1e-12, reduction: str = "mean",
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Two for a row's distance; a row's share of the loss over its norm for its gradient."""
    distance = torch.full(student.shape[:-1], 2.0, dtype=torch.float64, device=student.device, requires_grad=True)
    value = reduce(distance, weight, reduction)
    (share,) = torch.autograd.grad(value, distance, grad_output.double())
    # A norm whose square leaves the range is infinite.
    norms = (x.double().norm(dim=-1).clamp(eps, 1e154) for x in (student, teacher))
    for_student, for_teacher = ((share.abs() / norm).unsqueeze(-1) for norm in norms)
    return value.detach(), for_student, for_teacher


def mse_scales(
    student: Tensor, teacher: Tensor, grad_output: Tensor, *, normalize: bool = True, norm_eps: float = 1e-12,
    reduction: str = "mean", weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The squares of what is subtracted, and their derivative; over the norm where rows are normalised, together with
    the whole row's share along the row."""
    s, t = (x.double() for x in (student, teacher))
    norms = [x.norm(dim=-1, keepdim=True).clamp(norm_eps, 1e154) if normalize else torch.ones_like(x) for x in (s, t)]
    sizes = sum(x.abs() / norm for x, norm in zip((s, t), norms, strict=True)).requires_grad_()
    value = reduce(sizes.square(), None if weight is None else weight.unsqueeze(-1), reduction)
    (share,) = torch.autograd.grad(value, sizes, grad_output.double())
    share = share.abs()
    if normalize:
        share = share.norm(dim=-1, keepdim=True)
    return value.detach(), share / norms[0], share / norms[1]


def rows_arguments(kind: str, student: Tensor, teacher: Tensor, *made: Tensor) -> tuple:
    """Of cosine_rows: in the forward the loss alone, in the backward both gradients."""
    grad_output = made[0].expand(len(student)) if made else None
    return student, teacher, None, None, grad_output, *RowOptions(kind, "sum", len(student), 1e-12, *[bool(made)] * 2)


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
    forward_arguments=partial(rows_arguments, "cosine"),
    backward_arguments=partial(rows_arguments, "cosine"),
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
    forward_arguments=partial(rows_arguments, "mse"),
    backward_arguments=partial(rows_arguments, "mse"),
)
