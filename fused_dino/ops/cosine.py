"""Cosine and squared error between rows: the choice of the backend, and the autograd.Function.

With s = student / max(|student|, eps), t likewise:

    cosine   value = 1 - <s, t>     d value / d student = (<s, t> s - t) / |student|
    mse      value = |s - t|^2      d value / d student = 2 (<s, t> s - t) / |student|
    raw      value = |s - t|^2 of the rows as they are, or as standardize.py makes them

A clamped norm is a constant, and the gradient then loses its part along s. A row of weight 0 is left out, whatever it
holds: its value and its gradients are 0.

The forward writes the student's gradient for a grad_output of 1, with weight and scale in it, where
`stores_gradient` says so. The first backward returns it, scaled in place. Later backwards compute it from the rows.

With an index [B, M] the student is [B M, D] and the target [B, N, D]: row b M + m meets target[b, index[b, m]]. The
target then gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.cosine import cosine_distance, leave_out, prepare, take_rows
from ..reference.dtypes import acc_dtype, upcast
from .cosine_torch import cosine_rows_torch
from .cosine_triton import RowOptions, cosine_rescale_, cosine_rows
from .function import batched_rows, make_function
from .standardize import Standardization, count_rows, standardize


def forward(
    student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None, scale: Tensor | None,
    options: RowOptions, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, the loss without scale, and the student's gradient where it is stored, else an empty tensor."""
    run = cosine_rows if backend == "triton" else cosine_rows_torch
    return run(student, target, index, weight, scale, None, options)[:3]


def backward(ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor], needs_grad: tuple[bool, bool]) -> tuple:
    """Return the gradients of student and target."""
    student, target, index, weight, scale, stored = saved
    (grad,), options = grads, ctx.options
    if index is not None and needs_grad[1]:
        raise NotImplementedError("target gets no gradient where index is given; give target.detach()")
    may_return = options.student_grad and not needs_grad[1] and not torch.compiler.is_compiling()
    if may_return and not hasattr(ctx, "returned"):
        ctx.returned = True  # once only: it may become p.grad, and anyone may change it
        grad_student = stored.data  # the same memory, with its own version counter and reference count
        rescale(grad_student, grad, ctx.backend)
        return grad_student, None
    run = cosine_rows if ctx.backend == "triton" else cosine_rows_torch
    grad = grad.expand(student.shape[0]) if grad.ndim == 0 else grad
    kind, reduction, divisor, eps = options[:4]
    return run(student, target, index, weight, scale, grad, RowOptions(kind, reduction, divisor, eps, *needs_grad))[2:]


def formula(
    student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None, scale: Tensor | None,
    options: RowOptions,
) -> Tensor:  # fmt: skip
    """Return the loss by eager formulas, for higher derivatives."""
    target = target if index is None else take_rows(target, index).flatten(0, 1)
    kind, reduction = options.kind, options.reduction
    if kind == "cosine":
        values = cosine_distance(leave_out(student, weight), leave_out(target, weight), options.eps)
    else:
        s, t = (prepare(x, weight, normalize=kind == "mse", norm_eps=options.eps) for x in upcast(student, target))
        values = (s - t).square() if reduction == "elements" else (s - t).square().sum(-1)
    for factor in (weight if weight is None or values.ndim == 1 else weight.unsqueeze(-1), scale):
        values = values if factor is None else values * factor
    return (values.sum() if reduction == "sum" else values) / options.divisor


def vmap(
    apply: Callable, info: Any, in_dims: tuple, student: Tensor, target: Tensor, index: Tensor | None,
    weight: Tensor | None, scale: Tensor | None, options: RowOptions, backend: str,
) -> tuple:  # fmt: skip
    """Run one call over the rows of all batches, which share no value, and reduce the rows of each batch."""
    batch = info.batch_size
    rows = batched_rows(batch, in_dims[:4], student, target, index, weight)
    each = "elements" if options.reduction == "elements" else "rows"
    values = apply(*rows, None, RowOptions(options.kind, each, options.divisor, options.eps), backend)[0]
    values = values.unflatten(0, (batch, values.shape[0] // batch))
    unscaled = values.sum(1) if options.reduction == "sum" else values
    loss = unscaled
    if scale is not None:
        loss = unscaled * (scale if in_dims[4] is None else scale.view(batch, *(1 for _ in unscaled.shape[1:])))
    return (loss, unscaled, unscaled.new_empty(0)), (0, 0, None)


cosine_function = make_function("CosineFunction", forward, backward, formula, inputs=2, saved=2, vmap=vmap)


def rescale(grad: Tensor, grad_output: Tensor, backend: str) -> None:
    """Multiply the gradient by grad_output in place, unless that is known to be 1."""
    if backend == "triton":
        cosine_rescale_(grad, grad_output)
    elif grad.device.type != "cpu" or type(grad_output) is not Tensor or grad_output != 1:
        grad.mul_(grad_output)  # on a CPU reading the value costs less than a pass


def stores_gradient(student: Tensor, target: Tensor, reduction: str) -> bool:
    """Whether the forward writes the gradient. It is a hint from what the host knows: the backward is right anyway."""
    return (
        torch.is_grad_enabled()
        and student.requires_grad
        and not target.requires_grad
        and reduction == "sum"  # else grad_output is no scalar
        and student.dtype != torch.float16  # 1/N underflows before the factor of a GradScaler arrives
        and not torch.compiler.is_compiling()  # inductor would copy what the backward scales in place
    )


def rows_loss(
    student: Tensor,  # [..., D]
    target: Tensor,  # [..., D], or [B, N, D] with an index
    *,
    kind: str,
    index: Tensor | None = None,  # [B, M]
    weight: Tensor | None,  # [...]
    scale: Tensor | None,  # []
    reduction: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and the loss without scale and without a gradient."""
    leading, width = student.shape[:-1], student.shape[-1]
    if student.ndim != 2:  # a view would be a node of the graph
        student, target = student.reshape(-1, width), target if index is not None else target.reshape(-1, width)
    elements = kind != "cosine" and reduction == "none"
    divisor = 1
    if reduction == "mean":
        divisor = (1 if kind == "cosine" else width) * (1 if weight is not None else student.shape[0])
    if weight is not None:
        weight = weight.reshape(-1)
        if reduction == "mean":
            total = weight.sum()
            weight = weight / torch.where(total == 0, 1, total)
    row_reduction = {"none": "elements" if elements else "rows"}.get(reduction, "sum")
    options = RowOptions(kind, row_reduction, divisor, eps, stores_gradient(student, target, row_reduction))
    loss, unscaled, _ = cosine_function(student, target, index, weight, scale, options, backend)
    unscaled = loss.detach() if scale is None else unscaled
    return (loss, unscaled) if reduction != "none" else (loss.reshape((*leading, *loss.shape[1:])), unscaled)


def cosine_loss(student: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Return what rows_loss returns, for the cosine distance."""
    return rows_loss(student, target, kind="cosine", **options)


def mse_loss(
    student: Tensor, target: Tensor, *, normalize: bool, whiten: bool, eps: float, norm_eps: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return what rows_loss returns, for the squared error of prepared rows."""
    if not whiten:
        return rows_loss(student, target, kind="mse" if normalize else "raw", eps=norm_eps, **options)
    how = Standardization(normalize, eps, norm_eps, acc_dtype(student, target))
    width, backend, weight = student.shape[-1], options["backend"], options["weight"]
    rows_left = () if weight is None else (weight.reshape(-1), count_rows(weight))
    s, t = (standardize(x.reshape(-1, width), how, backend, *rows_left) for x in (student, target))
    return rows_loss(s.reshape(student.shape), t.reshape(target.shape), kind="raw", eps=norm_eps, **options)
