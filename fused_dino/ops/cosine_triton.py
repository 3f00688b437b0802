"""Cosine and squared error between rows on a GPU: the launchers, and the ops that torch's dispatcher knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch
from .tickets import ticket

# {columns that a program holds at a time: its warps}. A launch takes the narrowest that holds a row, else the widest.
# A thread holds 8 columns of each row, which keeps it within 64 registers, except in float64.
CONFIGURATIONS = {256: 1, 1024: 4, 4096: 16}
# Warps that 132 multiprocessors run at once, 32 each, by 64 registers a thread. As many programs as they make take all
# rows in turn: 65,536 rows of width 1024 by 1,056 programs are 62 or 63 each, and 1,056 sums to finish.
MANY_ROWS = 132 * 32
RESCALE_BLOCK = 4096


class RowOptions(NamedTuple):
    """Options of cosine_rows."""

    kind: str  # cosine, mse, or raw: the squared error of rows that are not normalised
    reduction: str  # sum, rows or elements
    divisor: int  # of the loss
    eps: float  # the smallest norm that divides
    student_grad: bool = False  # whether this gradient is written; the forward writes it for a grad_output of 1
    target_grad: bool = False


def cosine_rows_empty(
    student: Tensor,  # [N, D]
    target: Tensor,  # [N, D], or [batch, positions, D] with an index
    index: Tensor | None,  # [batch, N / batch]
    weight: Tensor | None,  # [N]
    scale: Tensor | None,  # []
    grad_output: Tensor | None,  # [N], or [N, D] by elements; None in the forward
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate the loss, the loss without scale, and both gradients. A result that is not computed is empty."""
    shape = {"sum": (), "rows": student.shape[:1], "elements": student.shape}[options.reduction]
    forward = grad_output is None
    loss = student.new_empty(shape if forward else 0, dtype=acc_dtype(student, target))
    unscaled = loss.new_empty(() if forward and scale is not None and options.reduction == "sum" else 0)
    grad_student = student.new_empty(student.shape if options.student_grad else 0)
    grad_target = target.new_empty(target.shape if options.target_grad else 0)
    return loss, unscaled, grad_student, grad_target


def launch_options(loss: Tensor, width: int, eps: float) -> dict[str, Any]:
    """Return the compile-time constants and options of a launch.

    eps is one of them: as an argument Triton would round it to float32, for float64 too. Fusing a multiplication and
    an addition is set explicitly: it rounds once less, and Triton 3.10 changes the default.
    """
    block = next((block for block in CONFIGURATIONS if block >= width), max(CONFIGURATIONS))
    warps = max(1, CONFIGURATIONS[block] // (1 + (loss.dtype == torch.float64)))
    constants = {"WIDTH": width, "EPS": eps, "BLOCK": block}
    return {**constants, "ACC": acc_of(loss.dtype), "num_warps": warps, "enable_fp_fusion": True}


def launch_cosine_rows(
    out: tuple[Tensor, ...], student: Tensor, target: Tensor, index: Tensor | None, weight: Tensor | None,
    scale: Tensor | None, grad_output: Tensor | None, row_options: RowOptions,
) -> None:  # fmt: skip
    """Fill `out`, the results that cosine_rows_empty allocated."""
    from ..kernels.cosine import cosine_rows_kernel

    kind, reduction, divisor, eps, *needs_grad = row_options
    student, target = rows_of(student, target)
    loss, unscaled, grad_student, grad_target = out
    rows, width = student.shape
    if not rows:
        for x in (loss, unscaled):
            x.fill_(0.0 if divisor else float("nan"))  # a sum over no rows is 0, a mean is NaN
        return
    options = launch_options(loss, width, eps)
    programs = min(rows, MANY_ROWS // options["num_warps"])
    summed = grad_output is None and reduction == "sum"
    strides = (0, 0) if grad_output is None else (*grad_output.stride(), 0)[:2]
    subset: tuple[Any, ...] = (None,) * 4
    if index is not None:
        index = index.contiguous()
        subset = index, index.shape[1], target.shape[1], target.stride(0)
    with torch.cuda.device_of(student):  # the tensor's GPU need not be the current one; no-op on a CPU
        launch(cosine_rows_kernel, (programs,),
            student, target, weight, scale, grad_output,
            loss if grad_output is None else None, unscaled if unscaled.numel() else None,
            loss.new_empty(programs) if summed else None, ticket(student) if summed else None,
            grad_student if needs_grad[0] else None, grad_target if needs_grad[1] else None,
            student.stride(0), target.stride(-2), 0 if weight is None else weight.stride(0), *strides, rows, divisor,
            *subset,
            KIND=kind, REDUCTION=reduction, **options,
        )  # fmt: skip


def cosine_rescale_empty(grad: Tensor, grad_output: Tensor) -> None:
    """Allocate nothing: the op changes `grad`."""


def launch_cosine_rescale_(out: None, grad: Tensor, grad_output: Tensor) -> None:
    """Multiply grad by grad_output in place. Where that is 1, the programs return at once."""
    from ..kernels.cosine import cosine_rescale_kernel

    if not grad.numel():
        return
    programs = min(cdiv(grad.numel(), RESCALE_BLOCK), 1024)
    with torch.cuda.device_of(grad):
        launch(
            cosine_rescale_kernel,
            (programs,),
            grad,
            grad_output,
            grad.numel(),
            BLOCK=RESCALE_BLOCK,
            ACC=acc_of(grad.dtype),
            num_warps=8,
        )


cosine_rows = launched("cosine_rows", cosine_rows_empty, launch_cosine_rows)
cosine_rescale_ = launched("cosine_rescale_", cosine_rescale_empty, launch_cosine_rescale_)
