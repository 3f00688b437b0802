"""Cosine and squared error between rows in plain torch: the closed form of value and gradients, in one pass."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..reference.dtypes import upcast, without_autocast
from .cosine_triton import cosine_rows_fake
from .dispatch import by_rows


def unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Rows over their norms, 1 / norm, and which norms are clamped. Products are taken of these: the square of a large
    norm leaves the range."""
    norm = torch.linalg.vecdot(x, x).sqrt().unsqueeze(-1)
    inverse = 1 / norm.clamp(min=eps)
    return x * inverse, inverse, norm < eps


def some_rows(
    student: Tensor, teacher: Tensor, scale: Tensor, *,
    kind: str, elements: bool, eps: float, loss: bool, for_student: bool, for_teacher: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What is wanted of some rows: their values, the gradients of student and of teacher.

    scale: the gradient of each row's value, [n, 1], or of each element's, [n, D].
    """
    s, t = upcast(student, teacher)
    s_unit = t_unit = None
    if kind != "raw":
        (s, *s_unit), (t, *t_unit) = unit(s, eps), unit(t, eps)
    cos = torch.linalg.vecdot(s, t).unsqueeze(-1)
    made = []
    if loss and kind == "cosine":
        made.append(1 - cos.squeeze(-1))
    elif loss:
        error = s - t
        made.append(error.square_() if elements else torch.linalg.vecdot(error, error))
    gradient = partial(gradient_of_elements if elements else gradient_of_rows, cos=cos, kind=kind)
    if for_student:
        made.append(gradient(s, t, scale, s_unit))
    if for_teacher:
        made.append(gradient(t, s, scale, t_unit))
    return tuple(made)


def gradient_of_rows(
    x: Tensor, y: Tensor, scale: Tensor, unit: list[Tensor] | None, *, cos: Tensor, kind: str
) -> Tensor:
    """The gradient of what became x; the two inputs are alike."""
    if kind != "cosine":
        scale = 2 * scale
    if unit is None:
        return (x - y).mul_(scale)
    inverse, clamped = unit
    return (x * torch.where(clamped, float(kind != "cosine"), cos)).sub_(y).mul_(scale * inverse)


def gradient_of_elements(
    x: Tensor, y: Tensor, scale: Tensor, unit: list[Tensor] | None, *, cos: Tensor, kind: str
) -> Tensor:
    u = (x - y).mul_(2 * scale)
    if unit is None:
        return u
    inverse, clamped = unit
    along = torch.where(clamped, 0, torch.linalg.vecdot(u, x).unsqueeze(-1))
    return (u - x * along).mul_(inverse)


def cosine_rows_torch(
    student: Tensor, teacher: Tensor, weight: Tensor | None, alpha: Tensor | None, grad_output: Tensor | None,
    kind: str, reduction: str, count: int, eps: float, for_student: bool, for_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = cosine_rows_fake(
        student, teacher, weight, alpha, grad_output, kind, reduction, count, eps, for_student, for_teacher
    )
    loss, value, *grads = out
    elements, wanted = reduction == "elements", [for_student, for_teacher]
    share = (loss.new_ones(()) if weight is None else weight.unsqueeze(-1)) / count
    outer = share if alpha is None else share * alpha
    scale = outer if grad_output is None else outer * (grad_output if elements else grad_output.unsqueeze(-1))
    scale = scale.expand(len(student), student.shape[1] if elements else 1)

    run = partial(
        some_rows, kind=kind, elements=elements, eps=eps, loss=grad_output is None, for_student=for_student,
        for_teacher=for_teacher,
    )  # fmt: skip
    filled = [grad for grad, want in zip(grads, wanted, strict=True) if want]
    if grad_output is None:
        filled.insert(0, loss.new_empty(student.shape if elements else student.shape[:1]))
    with without_autocast(student):  # to which vecdot is a matrix product
        made = list(by_rows(run, tuple(filled), student, teacher, scale))
    if grad_output is None:
        values = made.pop(0)
        if reduction != "sum":
            loss = values * (outer if elements else outer.squeeze(-1))
        else:
            loss = (values if weight is None else values * weight).sum() / count
            if alpha is not None:
                loss, value = loss * alpha, loss
    for_s, for_t = (made.pop(0) if want else grad for grad, want in zip(grads, wanted, strict=True))
    return loss, value, for_s, for_t
