"""Cosine and squared error between rows on a GPU: the launchers, and the ops that torch's dispatcher knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch
from .tickets import ticket

# Columns that one program holds at a time, and its warps: the narrowest that takes a row at once, else the widest.
# A thread holds 8 columns of each row, which leaves it within 64 registers, but for float64.
CONFIGURATIONS = {256: 1, 1024: 4, 4096: 16}
# Warps that 132 multiprocessors run at once, 32 each, by 64 registers a thread. As many programs as they make take all
# rows in turn: 65,536 rows of width 1024 by 1,056 programs are 62 or 63 each, and 1,056 sums to finish.
MANY_ROWS = 132 * 32
RESCALE_BLOCK = 4096


class RowOptions(NamedTuple):
    """What is computed of rows."""

    kind: str  # cosine, mse, or raw: mse of rows as they are
    reduction: str  # sum, rows or elements
    divisor: int  # of the loss
    eps: float  # the smallest norm that is divided by
    for_student: bool = False  # whether the gradient is written: in the forward, for a grad_output of 1
    for_target: bool = False


def cosine_rows_empty(
    student: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    weight: Tensor | None,  # [N]
    scale: Tensor | None,  # []
    grad_output: Tensor | None,  # [N], or [N, D] by elements; None: the forward
    options: RowOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, it without scale, and the gradients of student and target; empty where it is not wanted."""
    shape = {"sum": (), "rows": student.shape[:1], "elements": student.shape}[options.reduction]
    forward = grad_output is None
    loss = student.new_empty(shape if forward else 0, dtype=acc_dtype(student, target))
    value = loss.new_empty(() if forward and scale is not None and options.reduction == "sum" else 0)
    for_s = student.new_empty(student.shape if options.for_student else 0)
    for_t = target.new_empty(target.shape if options.for_target else 0)
    return loss, value, for_s, for_t


def launch_options(loss: Tensor, width: int, eps: float) -> dict[str, Any]:
    """eps is compiled in: as an argument Triton would round it to float32, for float64 too.

    Multiplications and additions may be fused, explicitly: it rounds once less, and Triton 3.10 changes the default.
    """
    block = next((block for block in CONFIGURATIONS if block >= width), max(CONFIGURATIONS))
    warps = max(1, CONFIGURATIONS[block] // (1 + (loss.dtype == torch.float64)))
    constants = {"WIDTH": width, "EPS": eps, "BLOCK": block}
    return {**constants, "ACC": acc_of(loss.dtype), "num_warps": warps, "enable_fp_fusion": True}


def launch_cosine_rows(
    out: tuple[Tensor, ...], student: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor | None,
    grad_output: Tensor | None, how: RowOptions,
) -> None:  # fmt: skip
    from ..kernels.cosine import cosine_rows_kernel

    student, target = rows_of(student, target)
    loss, value, for_s, for_t = out
    rows, width = student.shape
    if not rows:
        for x in (loss, value):
            x.fill_(0.0 if how.divisor else float("nan"))  # a sum over nothing, and a mean
        return
    options = launch_options(loss, width, how.eps)
    programs = min(rows, MANY_ROWS // options["num_warps"])
    summed = grad_output is None and how.reduction == "sum"
    strides = (0, 0) if grad_output is None else (*grad_output.stride(), 0)[:2]
    with torch.cuda.device_of(student):  # the tensor's GPU need not be the current one; no-op on a CPU
        launch(cosine_rows_kernel, (programs,),
            student, target, weight, scale, grad_output,
            loss if grad_output is None else None, value if value.numel() else None,
            loss.new_empty(programs) if summed else None, ticket(student) if summed else None,
            for_s if how.for_student else None, for_t if how.for_target else None,
            student.stride(0), target.stride(0), 0 if weight is None else weight.stride(0), *strides, rows, how.divisor,
            KIND=how.kind, REDUCTION=how.reduction, **options,
        )  # fmt: skip


def cosine_rescale_empty(grad: Tensor, grad_output: Tensor) -> None:
    """Nothing: the op changes `grad`."""


def launch_cosine_rescale_(out: None, grad: Tensor, grad_output: Tensor) -> None:
    """grad *= grad_output, which no program does where that is 1."""
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
