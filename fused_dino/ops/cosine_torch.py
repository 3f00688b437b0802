"""Cosine and squared error between rows in plain torch: the closed form of value and gradients, block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..reference.dtypes import upcast
from .blocks import blocks
from .cosine_triton import RowOptions, cosine_rows_empty


def unit(x: Tensor, eps: float, into: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows over their norms, 1 / norm, and which norms are clamped. Products are taken of these: the square of a large
    norm leaves the range."""
    norm = torch.mul(x, x, out=into).sum(-1, keepdim=True).sqrt()
    inverse = 1 / norm.clamp(min=eps)
    return torch.mul(x, inverse, out=into), inverse, norm < eps


def some_rows(
    student: Tensor, teacher: Tensor, scale: Tensor, into: list[Tensor | None], spare: list[Tensor | None], *,
    kind: str, elements: bool, eps: float, loss: bool, for_student: bool, for_teacher: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What is wanted of some rows: their values, the gradients of student and of teacher.

    scale: the gradient of each row's value, [n, 1], or of each element's, [n, D]. into: for each result, the memory
    to make it in, or None; spare: memory for three [n, D], likewise.
    """
    s, t = upcast(student, teacher)
    s_unit = t_unit = None
    cos = s.new_empty(0)  # of which rows as they are have no use
    if kind != "raw":
        (s, *s_unit), (t, *t_unit) = unit(s, eps, spare[0]), unit(t, eps, spare[1])
        cos = torch.mul(s, t, out=spare[2]).sum(-1, keepdim=True)
    made = []
    if loss and kind == "cosine":
        made.append(1 - cos.squeeze(-1))
    elif loss:
        error = torch.sub(s, t, out=spare[2]).square_()
        made.append(error if elements else error.sum(-1))
    gradient = partial(gradient_of_elements if elements else gradient_of_rows, cos=cos, kind=kind)
    if for_student:
        made.append(gradient(s, t, scale, s_unit, into[len(made)]))
    if for_teacher:
        made.append(gradient(t, s, scale, t_unit, into[len(made)]))
    return tuple(made)


def gradient_of_rows(
    x: Tensor, y: Tensor, scale: Tensor, unit: list[Tensor] | None, into: Tensor | None, *, cos: Tensor, kind: str
) -> Tensor:
    """The gradient of what became x; the two inputs are alike."""
    if kind != "cosine":
        scale = 2 * scale
    if unit is None:
        return torch.sub(x, y, out=into).mul_(scale)
    inverse, clamped = unit
    along = torch.where(clamped, float(kind != "cosine"), cos)
    return torch.mul(x, along, out=into).sub_(y).mul_(scale * inverse)


def gradient_of_elements(
    x: Tensor, y: Tensor, scale: Tensor, unit: list[Tensor] | None, into: Tensor | None, *, cos: Tensor, kind: str
) -> Tensor:
    u = torch.sub(x, y, out=into).mul_(2 * scale)
    if unit is None:
        return u
    inverse, clamped = unit
    along = torch.where(clamped, 0, (u * x).sum(-1, keepdim=True))
    return u.sub_(x * along).mul_(inverse)


def in_blocks(run: Callable, outputs: list[Tensor], student: Tensor, teacher: Tensor, scale: Tensor) -> list[Tensor]:
    """run(...), as some_rows, into `outputs`, in blocks that use the same memory again and again: on a CPU fresh memory
    costs more than a pass."""
    if torch.compiler.is_compiling() or student.device.type != "cpu":
        made = run(student, teacher, scale, [None] * len(outputs), [None] * 3)
        return [x.to(out.dtype) for x, out in zip(made, outputs, strict=True)]
    parts = list(blocks(student))
    # Where rows do not lie one after another, an element's neighbours in memory are those of its column.
    spare = [torch.empty_like(x[parts[0]], dtype=scale.dtype) for x in (student, teacher, student)] if parts else []
    direct = student.stride(1) == teacher.stride(1) == 1
    for part in parts:
        into = [out[part] if direct and out.dtype == scale.dtype and out.ndim == 2 else None for out in outputs]
        made = run(student[part], teacher[part], scale[part], into, [x[: student[part].shape[0]] for x in spare])
        for out, x, target in zip(outputs, made, into, strict=True):
            if x is not target:
                out[part] = x
    return outputs


def cosine_rows_torch(
    student: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor | None, grad_output: Tensor | None,
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, value, *grads = cosine_rows_empty(student, target, weight, scale, grad_output, options)
    kind, reduction, divisor, eps, *needs_grad = options
    elements = reduction == "elements"
    share = (loss.new_ones(()) if weight is None else weight.unsqueeze(-1)) / divisor
    outer = share if scale is None else share * scale
    factor = outer if grad_output is None else outer * (grad_output if elements else grad_output.unsqueeze(-1))
    factor = factor.expand(student.shape[0], student.shape[1] if elements else 1)

    run = partial(
        some_rows, kind=kind, elements=elements, eps=eps, loss=grad_output is None, for_student=options.for_student,
        for_teacher=options.for_target,
    )  # fmt: skip
    filled = [grad for grad, needed in zip(grads, needs_grad, strict=True) if needed]
    if grad_output is None:
        filled.insert(0, loss.new_empty(student.shape if elements else student.shape[:1]))
    made = in_blocks(run, filled, student, target, factor)
    if grad_output is None:
        values = made.pop(0)
        if reduction != "sum":
            loss = values * (outer if elements else outer.squeeze(-1))
        else:
            loss = (values if weight is None else values * weight).sum() / divisor
            if scale is not None:
                loss, value = loss * scale, loss
    for_s, for_t = (made.pop(0) if needed else grad for grad, needed in zip(grads, needs_grad, strict=True))
    return loss, value, for_s, for_t
