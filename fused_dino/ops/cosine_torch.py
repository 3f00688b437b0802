"""Cosine and squared error between rows in plain torch: the closed form of value and gradients, block by block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..reference.cosine import take_rows
from ..reference.dtypes import upcast
from .blocks import blocks
from .cosine_triton import RowOptions, cosine_rows_empty

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element


def clear_(x: Tensor, left: Tensor) -> Tensor:
    """Set the rows of x to 0, NaN included, where `left` [N, 1] is False.

    It clears their bits: on a CPU masked_fill_ takes ten times as long.
    """
    integers = INTEGERS[x.element_size()]
    bits = left.to(integers).neg_()  # of -1 all are set
    x.view(integers).bitwise_and_(bits if x.ndim == 2 else bits.squeeze(1))
    return x


def unit(x: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows over their norms, 1 / norm, and whether a norm is clamped.

    Products are taken of rows of length one: the square of a large norm leaves the range.
    """
    norm = torch.mul(x, x, out=out).sum(-1, keepdim=True).sqrt()
    inverse = 1 / norm.clamp(min=eps)
    return torch.mul(x, inverse, out=out), inverse, norm < eps


def compute_block(
    student: Tensor, target: Tensor, factor: Tensor, left: Tensor | None, out: list[Tensor | None],
    scratch: list[Tensor | None], *, kind: str, elements: bool, eps: float, loss: bool, student_grad: bool,
    target_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the values of a block of rows and the gradients of student and target, as many of the three as asked.

    Args:
        factor: Gradient of the loss with respect to each row's value, [n, 1], or each element's, [n, D].
        left: Whether each row counts, [n, 1]; the results of the others are 0. None: all of them do.
        out: Memory for each result, or None. A result need not use it.
        scratch: Memory for three intermediate [n, D], or None for each.
    """
    s, t = upcast(student, target)
    s_norm = t_norm = None
    cos = s.new_empty(0)  # not used for rows that are not normalised
    if kind != "raw":
        (s, *s_norm), (t, *t_norm) = unit(s, eps, scratch[0]), unit(t, eps, scratch[1])
        cos = torch.mul(s, t, out=scratch[2]).sum(-1, keepdim=True)
    results = []
    if loss and kind == "cosine":
        results.append(1 - cos.squeeze(-1))
    elif loss:
        error = torch.sub(s, t, out=scratch[2]).square_()
        results.append(error if elements else error.sum(-1))
    gradient = partial(gradient_of_elements if elements else gradient_of_rows, cos=cos, kind=kind)
    if student_grad:
        results.append(gradient(s, t, factor, s_norm, out[len(results)]))
    if target_grad:
        results.append(gradient(t, s, factor, t_norm, out[len(results)]))
    return tuple(results if left is None else (clear_(x, left) for x in results))


def gradient_of_rows(
    x: Tensor, y: Tensor, factor: Tensor, norm: list[Tensor] | None, out: Tensor | None, *, cos: Tensor, kind: str
) -> Tensor:
    """Return the gradient of the input behind x, for one value per row.

    x is student or target and y the other one, normalised if `norm` has x's 1 / norm and whether it is clamped.
    """
    if kind != "cosine":
        factor = 2 * factor
    if norm is None:
        return torch.sub(x, y, out=out).mul_(factor)
    inverse, clamped = norm
    projection = torch.where(clamped, float(kind != "cosine"), cos)
    return torch.mul(x, projection, out=out).sub_(y).mul_(factor * inverse)


def gradient_of_elements(
    x: Tensor, y: Tensor, factor: Tensor, norm: list[Tensor] | None, out: Tensor | None, *, cos: Tensor, kind: str
) -> Tensor:
    """Return the gradient of the input behind x, for one value per element."""
    grad = torch.sub(x, y, out=out).mul_(2 * factor)
    if norm is None:
        return grad
    inverse, clamped = norm
    projection = torch.where(clamped, 0, (grad * x).sum(-1, keepdim=True))
    return grad.sub_(x * projection).mul_(inverse)


def in_blocks(
    run: Callable, outputs: list[Tensor], student: Tensor, target: Tensor, factor: Tensor, left: Tensor | None
) -> list[Tensor]:
    """Write what `run` (see compute_block) returns into `outputs`, block by block.

    All blocks use the same memory: on a CPU fresh memory costs more than a pass.
    """
    if torch.compiler.is_compiling() or student.device.type != "cpu":
        results = run(student, target, factor, left, [None] * len(outputs), [None] * 3)
        return [x.to(out.dtype) for x, out in zip(results, outputs, strict=True)]
    parts = list(blocks(student))
    # Where rows do not lie one after another, an element's neighbours in memory are those of its column.
    scratch = [torch.empty_like(x[parts[0]], dtype=factor.dtype) for x in (student, target, student)] if parts else []
    direct = student.stride(1) == target.stride(1) == 1
    for part in parts:
        slots = [out[part] if direct and out.dtype == factor.dtype and out.ndim == 2 else None for out in outputs]
        memory = slots, [x[: student[part].shape[0]] for x in scratch]
        results = run(student[part], target[part], factor[part], None if left is None else left[part], *memory)
        for out, x, slot in zip(outputs, results, slots, strict=True):
            if x is not slot:
                out[part] = x
    return outputs


def cosine_rows_torch(
    student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None, scale: Tensor | None,
    grad_output: Tensor | None, options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what cosine_rows_empty allocates."""
    loss, unscaled, *grads = cosine_rows_empty(student, target, index, weight, scale, grad_output, options)
    target = target if index is None else take_rows(target, index).flatten(0, 1)
    kind, reduction, divisor, eps, *needs_grad = options
    elements = reduction == "elements"
    row_weight = (loss.new_ones(()) if weight is None else weight.unsqueeze(-1)) / divisor
    row_factor = row_weight if scale is None else row_weight * scale
    factor = row_factor
    if grad_output is not None:
        factor = row_factor * (grad_output if elements else grad_output.unsqueeze(-1))
    factor = factor.expand(student.shape[0], student.shape[1] if elements else 1)

    run = partial(
        compute_block, kind=kind, elements=elements, eps=eps, loss=grad_output is None,
        student_grad=options.student_grad, target_grad=options.target_grad,
    )  # fmt: skip
    outputs = [grad for grad, needed in zip(grads, needs_grad, strict=True) if needed]
    if grad_output is None:
        outputs.insert(0, loss.new_empty(student.shape if elements else student.shape[:1]))
    outputs = in_blocks(run, outputs, student, target, factor, None if weight is None else weight.unsqueeze(-1) != 0)
    if grad_output is None:
        values = outputs.pop(0)
        if reduction != "sum":
            loss = values * (row_factor if elements else row_factor.squeeze(-1))
        else:
            loss = (values if weight is None else values * weight).sum() / divisor
            if scale is not None:
                loss, unscaled = loss * scale, loss
    grad_student, grad_target = (outputs.pop(0) if needed else x for x, needed in zip(grads, needs_grad, strict=True))
    return loss, unscaled, grad_student, grad_target
