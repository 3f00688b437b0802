"""VICReg over the rows of all ranks, by the kernels of one process, with collectives between the launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from . import vicreg_triton as launches
from .dispatch import acc_of, cdiv, rows_of
from .plain import launch
from .vicreg_exchange import Moments, Ranks
from .vicreg_plan import BackwardOptions, Grads, Plan, Terms, terms_of
from .vicreg_tiles import PIECE, is_raw, padded
from .vicreg_triton import Saved

Sums = tuple[Tensor, Any, Tensor, Tensor]  # errors, N, squares of columns and squared covariances, of all ranks


def vicreg_ranks_triton(
    grads: Grads, student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None,
    options: BackwardOptions, ranks: Ranks,
) -> Terms:  # fmt: skip
    """Fills the gradients, and returns the loss and its terms over the rows of all ranks."""
    plan, own = options.plan, ranks.own if options.plan.gram else None
    student, target = rows_of(student, target)
    with torch.cuda.device_of(student):
        run = by_rows if plan.gram else by_columns
        sums, student, saved = run(student, target, acc_dtype(student, target), plan, ranks)
        if options.for_student or options.for_target:
            launches.launch_vicreg_bwd(grads, student, target, grad_output, weights, saved, options, own)
    return terms_of(*sums, student.shape[1], weights, plan)


def own_statistics(student: Tensor, target: Tensor, dtype: torch.dtype, plan: Plan) -> Saved:
    saved = launches.empty_saved(student, dtype, plan)
    if student.shape[0]:
        launches.launch_statistics(saved, student, target, is_raw(student, dtype), None, None, plan)
    else:
        for x in saved[:4]:
            x.zero_()
    return saved


def by_rows(
    student: Tensor, target: Tensor, dtype: torch.dtype, plan: Plan, ranks: Ranks
) -> tuple[Sums, Tensor, Saved]:
    """Multiply own rows with all rows. The errors are summed while rows are gathered."""
    own, gathered = ranks.own, ranks.start_gather(student)
    error = own_statistics(student, target, dtype, plan._replace(cov_weight=0.0)).facts[0] * student.numel()
    student = gathered()
    saved = launches.empty_saved(student, dtype, plan, own)
    if not student.shape[0]:
        return (error, 0, saved.squares.zero_(), error), student, saved
    raw, rows = is_raw(student, dtype), own.stop - own.start
    launches.launch_statistics(saved, student, None, raw, None, None, plan)
    saved.largest[0].copy_(ranks.first(saved.largest[0]))
    crosses = launches.launch_planes(saved, student, plan)
    parts, row_sums = launches.launch_product(saved, student, raw, plan, own) if rows else (None, None)
    if raw:  # rows' sums are those of columns, to which every rank adds
        of_rows = saved.squares.new_zeros(len(student)) if row_sums is None else row_sums.sum(0)
        row_sums = ranks.sum(of_rows).view(1, -1)
    if parts is not None:
        launches.launch_finish(saved, student, parts, row_sums, crosses, raw, None, None, plan, own)
    error, total = ranks.sum(torch.stack([error, saved.facts[6]])).unbind()
    return (error, student.shape[0], saved.squares, total), student, saved


def by_columns(
    student: Tensor, target: Tensor, dtype: torch.dtype, plan: Plan, ranks: Ranks
) -> tuple[Sums, Tensor, Saved]:
    """Multiply own rows about their own means, while the means of all ranks are summed."""
    n, d = student.shape
    saved = own_statistics(student, target, dtype, plan)
    first = student[0].double() if n else torch.zeros_like(saved.shift, dtype=torch.float64)
    mean, squares = first + saved.shift, saved.squares
    if not (plan.variance or plan.covariance):
        mean, squares = mean[:0], squares[:0]
    pending = ranks.start_moments(mean, n, saved.facts[0] * student.numel())
    product = squares.new_zeros(d if plan.covariance else 0, d)
    if plan.covariance and n:
        launches.launch_planes(saved, student, plan)
        parts, _ = launches.launch_product(saved, student, is_raw(student, dtype), plan)
    moments = pending()
    saved.largest[1].copy_(moments.rows)
    if plan.covariance and n:
        product = about_all(parts, saved, student, moments)
    squares, product = moments.sum(moments.squares(squares), product)
    if len(squares) and n:
        saved = saved._replace(shift=(moments.mean - first).to(dtype), squares=squares)
    if plan.covariance:
        saved, about = finish_options(saved, student, moments)
        launches.launch_finish(saved, student, product[None], None, None, False, None, None, plan, about=about)
    return (moments.error, moments.rows, squares, saved.facts[6]), student, saved


def about_all(parts: Tensor, saved: Saved, student: Tensor, moments: Moments) -> Tensor:
    """Returns the sum of the splits of a product about own means, as one about the means of all, [D, D]."""
    from ..kernels.vicreg_finish import vicreg_part_kernel

    splits, size, _ = parts.shape
    pieces = cdiv(size, PIECE)
    launch(vicreg_part_kernel, (pieces * (pieces + 1) // 2,),
        parts, student, saved.shift, saved.largest, moments.away.to(parts.dtype), len(student), size, splits,
        RAW=is_raw(student, parts.dtype), PIECE=PIECE, ACC=acc_of(parts.dtype), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return parts[0]


def finish_options(saved: Saved, student: Tensor, moments: Moments) -> tuple[Saved, Tensor | None]:
    """Returns what to save, and the means that vicreg_finish_kernel subtracts, or None without rows."""
    dtype = saved.shift.dtype
    if not student.shape[0]:
        return saved._replace(dots=saved.dots[:0]), None
    raw, d = saved.largest[0] < 0, student.shape[1]
    if student.dtype == torch.float16:  # no element of the product is larger than this bound
        bound = saved.squares.max() / moments.rows
        saved.facts[3].copy_(torch.where(raw & (bound > 0), 8192 / bound, 1))
    about = torch.where(raw, moments.mean, moments.away).to(dtype)
    return saved._replace(dots=saved.shift.new_empty(cdiv(padded(d), PIECE), d)), about
