"""VICReg's closed form in plain torch: the CPU fallback. The formulas stand in ops/vicreg.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.dtypes import wide, without_autocast
from .columns_torch import centre, passes
from .vicreg_plan import Plan

CPU_PANEL = 256  # rows of a symmetric product that are computed at a time, from the diagonal on


def symmetric_product(x: Tensor) -> Tensor:
    """x x^T; on a CPU panel by panel from the diagonal on, and mirrored, where that saves more than it costs."""
    m = len(x)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or m < 2 * CPU_PANEL:
        return x @ x.T
    out = x.new_empty(m, m)
    for start in range(0, m, CPU_PANEL):
        panel = slice(start, start + CPU_PANEL)
        torch.mm(x[panel], x[start:].T, out=out[panel, start:])
        for left in range(start + CPU_PANEL, m, CPU_PANEL):  # a transposed copy is quick where both sides are whole
            beside = slice(left, left + CPU_PANEL)
            out[beside, panel] = out[panel, beside].contiguous().T.contiguous()
    return out


def vicreg_fwd_torch(student: Tensor, teacher: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """invariance, variance, covariance, centred [N, D], squares [D], product [N, N] or [D, D]; empty where unwanted."""
    n, d = student.shape
    dtype = wide(student, teacher)
    zero = student.new_zeros((), dtype=dtype)
    invariance, variance, covariance, product = zero, zero.clone(), zero.clone(), student.new_empty(0, 0, dtype=dtype)
    with without_autocast(student):
        if plan.invariance:
            error = zero.clone()
            for rows in passes(student):
                error += (student[rows].to(dtype) - teacher[rows]).square_().sum()
            invariance = error / (n * d)
        if not (plan.variance or plan.covariance):
            return invariance, variance, covariance, student.new_empty(0, 0, dtype=dtype), zero.new_empty(0), product
        centred, squares = centre(student, dtype)
        spare = max(n - 1, 1)
        if plan.covariance:
            product = symmetric_product(centred if plan.gram else centred.T).div_(spare)
            if not plan.gram:
                product.diagonal().zero_()
        if plan.variance:
            variance = torch.relu(plan.gamma - deviation(squares, n, plan)).mean()
        if plan.covariance:
            total = zero.clone()
            for rows in passes(product):
                total += product[rows].square().sum()
            if plan.gram:
                total = total - (squares / spare).square().sum()
            covariance = total / plan.divisor
    return invariance, variance, covariance, centred, squares, product


def deviation(squares: Tensor, n: int, plan: Plan) -> Tensor:
    return (squares / (max(n - 1, 1) if plan.unbiased else n) + plan.eps).sqrt()


def vicreg_bwd_torch(
    student: Tensor, teacher: Tensor, centred: Tensor, squares: Tensor, product: Tensor,
    grad_invariance: Tensor | None, grad_variance: Tensor | None, grad_covariance: Tensor | None,
    for_student: bool, for_teacher: bool, plan: Plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, d = student.shape
    dtype = wide(student, teacher)
    for_s = student.new_empty(student.shape if for_student else 0)
    for_t = teacher.new_empty(teacher.shape if for_teacher else 0)
    spare = max(n - 1, 1)
    column = matrix = towards = None
    if plan.variance and grad_variance is not None:
        sigma = deviation(squares, n, plan)
        hinge = torch.where(sigma < plan.gamma, -grad_variance / (d * (spare if plan.unbiased else n)), 0)
        column = hinge / sigma
    if plan.covariance and grad_covariance is not None:
        scale = grad_covariance * (4 / (plan.divisor * spare))
        matrix = product * scale
        if plan.gram:
            column = (0 if column is None else column) - squares * (scale / spare)
    if plan.invariance and grad_invariance is not None:
        towards = grad_invariance * (2 / max(n * d, 1))
    made = for_s if for_s.dtype == dtype else for_s.to(dtype)
    for rows in passes(student):
        pull = made[rows] if for_student else student.new_empty(student[rows].shape, dtype=dtype)
        if towards is not None:
            pull.copy_(student[rows]).sub_(teacher[rows]).mul_(towards)
        else:
            pull.zero_()
        if for_teacher:
            for_t[rows] = -pull
        if for_student and column is not None:
            pull.addcmul_(centred[rows], column)
    if for_student and matrix is not None:
        with without_autocast(student):
            made.addmm_(*((matrix, centred) if plan.gram else (centred, matrix)))
    return made.to(for_s.dtype), for_t
