"""Cosine and squared error between rows on a GPU: the launchers, and the ops that torch's dispatcher knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.dtypes import wide
from .dispatch import acc_of, cdiv, define, rows_of
from .tickets import ticket

# Columns that one program holds at a time, and its warps: the narrowest that takes a row at once, else the widest.
# A thread holds 8 columns of each row, which leaves it within 64 registers, but for float64.
CONFIGURATIONS = {256: 1, 1024: 4, 4096: 16}
# Warps that 132 multiprocessors run at once, 32 each, by 64 registers a thread. As many programs as they make take all
# rows in turn: 65,536 rows of width 1024 by 1,056 programs are 62 or 63 each, and 1,056 sums to finish.
MANY_ROWS = 132 * 32
RESCALE_BLOCK = 4096


def cosine_rows_fake(
    student: Tensor, teacher: Tensor, weight: Tensor | None, alpha: Tensor | None, grad_output: Tensor | None,
    kind: str, reduction: str, count: int, eps: float, for_student: bool, for_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What the op returns, not filled; empty where it is not wanted."""
    shape = {"sum": (), "rows": student.shape[:1], "elements": student.shape}[reduction]
    forward = grad_output is None
    loss = student.new_empty(shape if forward else 0, dtype=wide(student, teacher))
    value = loss.new_empty(() if forward and alpha is not None and reduction == "sum" else 0)
    for_s = student.new_empty(student.shape if for_student else 0)
    for_t = teacher.new_empty(teacher.shape if for_teacher else 0)
    return loss, value, for_s, for_t


def launch_options(loss: Tensor, width: int, eps: float) -> dict[str, Any]:
    """eps is compiled in: as an argument Triton would round it to float32, for float64 too.

    Multiplications and additions may be fused, explicitly: it rounds once less, and Triton 3.10 changes the default.
    """
    block = next((block for block in CONFIGURATIONS if block >= width), max(CONFIGURATIONS))
    warps = max(1, CONFIGURATIONS[block] // (1 + (loss.dtype == torch.float64)))
    constants = {"WIDTH": width, "EPS": eps, "BLOCK": block}
    return {**constants, "ACC": acc_of(loss.dtype), "num_warps": warps, "enable_fp_fusion": True}


def cosine_rows_triton(
    student: Tensor, teacher: Tensor, weight: Tensor | None, alpha: Tensor | None, grad_output: Tensor | None,
    kind: str, reduction: str, count: int, eps: float, for_student: bool, for_teacher: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from ..kernels.cosine import cosine_rows_kernel

    student, teacher = rows_of(student, teacher)
    loss, value, for_s, for_t = cosine_rows_fake(
        student, teacher, weight, alpha, grad_output, kind, reduction, count, eps, for_student, for_teacher
    )
    rows, width = student.shape
    if not rows:
        for x in (loss, value):
            x.fill_(0.0 if count else float("nan"))  # a sum over nothing, and a mean
        return loss, value, for_s, for_t
    options = launch_options(loss, width, eps)
    programs = min(rows, MANY_ROWS // options["num_warps"])
    summed = grad_output is None and reduction == "sum"
    strides = (0, 0) if grad_output is None else (*grad_output.stride(), 0)[:2]
    with torch.cuda.device_of(student):  # the tensor's GPU need not be the current one; no-op on a CPU
        cosine_rows_kernel[(programs,)](
            student, teacher, weight, alpha, grad_output,
            loss if grad_output is None else None, value if value.numel() else None,
            loss.new_empty(programs) if summed else None, ticket(student) if summed else None,
            for_s if for_student else None, for_t if for_teacher else None,
            student.stride(0), teacher.stride(0), 0 if weight is None else weight.stride(0), *strides, rows, count,
            KIND=kind, REDUCTION=reduction, **options,
        )  # fmt: skip
    return loss, value, for_s, for_t


def cosine_rescale_triton(grad: Tensor, grad_output: Tensor) -> None:
    """grad *= grad_output, which no program does where that is 1."""
    from ..kernels.cosine import cosine_rescale_kernel

    if not grad.numel():
        return
    programs = min(cdiv(grad.numel(), RESCALE_BLOCK), 1024)
    with torch.cuda.device_of(grad):
        cosine_rescale_kernel[(programs,)](
            grad, grad_output, grad.numel(), BLOCK=RESCALE_BLOCK, ACC=acc_of(grad.dtype), num_warps=8
        )


cosine_rows = define(
    "cosine_rows(Tensor student, Tensor teacher, Tensor? weight, Tensor? alpha, Tensor? grad_output, str kind, "
    "str reduction, SymInt count, float eps, bool for_student, bool for_teacher) "
    "-> (Tensor loss, Tensor value, Tensor for_student_, Tensor for_teacher_)",
    cosine_rows_triton,
    cosine_rows_fake,
)
cosine_rescale_ = define(
    "cosine_rescale_(Tensor(a!) grad, Tensor grad_output) -> ()", cosine_rescale_triton, lambda grad, grad_output: None
)
