"""Standardised columns, of raw rows or of rows divided by their norms. See ops/standardize.py.

With `weight`, [N], rows of weight 0 are left out: they are not read, and what is written for them is 0. `counts` then
has the number of rows left, and the first of them. dof is not used.
"""

import triton
import triton.language as tl

from .columns import deviation, load_pivot, load_rows
from .cosine import inverse
from .store import store


@triton.jit
def skip_rows(weight, row, last):
    """Replace rows of weight 0 by `last`, which every mask excludes. A weight None is 1."""
    if weight is not None:
        row = tl.where(tl.load(weight + row, mask=row < last, other=0) != 0, row, last)
    return row


@triton.jit
def first_row(x, factors, counts, stride, column, inside, ACC: tl.constexpr):
    """Load the first row that counts, from which means are measured."""
    if counts is not None:
        first = tl.load(counts + 1)
        x += first * stride
        if factors is not None:
            factors += first
    return load_pivot(x, factors, column, inside, ACC)


@triton.jit
def standardize_statistics_kernel(
    x, factors, weight, counts,  # [N, D], last dimension contiguous; [N] or None; [N]; [2]
    means, squares,  # [RUNS, D], float64: of the rows left, from the first of all; about their own mean
    left,  # [RUNS]: how many they are
    stride, rows, width, rows_a_run,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns of one run of rows, and merges its blocks' means and squares (Chan et al.), as
    # column_statistics_kernel does where every row counts. A block may have no row left: its factors are then 0.
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    run = tl.program_id(1).to(tl.int64)
    inside = column < width
    first = tl.program_id(1) * rows_a_run
    last = tl.minimum(first + rows_a_run, rows)
    pivot = first_row(x, factors, counts, stride, column, inside, ACC)
    mean = tl.zeros((BLOCK_D,), tl.float64)
    square = tl.zeros((BLOCK_D,), tl.float64)
    before = 0
    for start in range(first, last, BLOCK_N):
        row = skip_rows(weight, (start + tl.arange(0, BLOCK_N)).to(tl.int64), last)  # int64: row * stride passes 2**31
        keep = (row < last).to(ACC)[:, None]  # a factor: as a mask it takes more registers
        y = load_rows(x, factors, stride, row, column, last, inside, ACC)
        here = tl.sum((row < last).to(tl.int32), 0)
        count = tl.maximum(here, 1).to(ACC)
        near = pivot + tl.sum(keep * (y - pivot[None, :]), 0) / count
        away = keep * (y - near[None, :])
        rest = tl.sum(away, 0) / count  # what the rounding of a large mean has left
        step = (near.to(tl.float64) - pivot.to(tl.float64)) + rest.to(tl.float64) - mean
        part = here.to(tl.float64) / tl.maximum(before + here, 1).to(tl.float64)
        mean += step * part
        square += (tl.sum(away * away, 0) - count * rest * rest).to(tl.float64)
        square += step * (step * (before.to(tl.float64) * part))
        before += here
    tl.store(means + run * width + column, mean, mask=inside)
    tl.store(squares + run * width + column, square, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(left + run, before)


@triton.jit
def standardize_merge_kernel(
    means, squares, left,  # as standardize_statistics_kernel writes them
    shift, total,  # [D]
    width, runs,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK columns, and merges the runs of rows in their order.
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    mean = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    before = tl.full((), 0, tl.float64)
    for run in range(runs):
        at = tl.cast(run, tl.int64) * width + column
        here = tl.load(left + run).to(tl.float64)
        step = tl.load(means + at, mask=inside, other=0) - mean
        part = here / tl.maximum(before + here, 1)
        mean += step * part
        square += tl.load(squares + at, mask=inside, other=0) + step * (step * (before * part))
        before += here
    tl.store(shift + column, mean, mask=inside)
    tl.store(total + column, square.to(total.dtype.element_ty), mask=inside)


@triton.jit
def standardize_factors_kernel(
    x,  # [N, D], last dimension contiguous
    factors,  # [N]: 1 / max(norm, EPS)
    stride, rows, width,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_N rows.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: row * stride passes 2**31
    square = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        value = load_rows(x, None, stride, row, column, rows, column < width, ACC)
        square += value * value
    factor = inverse(tl.sqrt(tl.sum(square, 1)), tl.full((), EPS, ACC))
    tl.store(factors + row, factor, mask=row < rows)


@triton.jit
def standardize_fwd_kernel(
    x, weight, counts, factors,  # [N, D], last dimension contiguous; [N] or None
    shift, squares,  # [D]: the means minus the first row, in float64, and the sums of squares about the means
    out,  # [N, D] contiguous
    stride, rows, width, dof,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of the result.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    read = skip_rows(weight, row, rows)
    value = load_rows(x, factors, stride, read, column, rows, inside, ACC)
    pivot = first_row(x, factors, counts, stride, column, inside, ACC)
    mean = pivot.to(tl.float64) + tl.load(shift + column, mask=inside, other=0)
    near = mean.to(ACC)  # the rest is subtracted too: a large mean's last digit is a large part of small deviations
    deviations = (value - near[None, :]) - (mean - near.to(tl.float64)).to(ACC)[None, :]
    square = tl.load(squares + column, mask=inside, other=1)
    if counts is not None:
        dof = tl.load(counts) - 1
    divisor = deviation(square, dof, 0.0, ACC) + tl.full((), EPS, ACC)
    live = (row < rows)[:, None] & inside[None, :]
    at = out + row[:, None] * width + column[None, :]
    value = deviations / divisor[None, :]
    if weight is not None:
        value = tl.where((read < rows)[:, None], value, 0)
    tl.store(at, value, mask=live)


@triton.jit
def standardize_sums_kernel(
    grad, out,  # [N, D] contiguous: gradient of the result, and the result; both are 0 in rows that are left out
    totals, products,  # [RUNS, D]: sums of grad, and of grad * out
    rows, width, rows_a_run,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns of one run of rows. It keeps one sum a column: LLVM crashes on unaligned rows
    # where every element of a block keeps its own.
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    total = tl.zeros((BLOCK_D,), ACC)
    product = tl.zeros((BLOCK_D,), ACC)
    first = tl.program_id(1) * rows_a_run
    last = tl.minimum(first + rows_a_run, rows)
    for start in range(first, last, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        g = load_rows(grad, None, width, row, column, last, inside, ACC)
        total += tl.sum(g, 0)
        product += tl.sum(g * load_rows(out, None, width, row, column, last, inside, ACC), 0)
    at = tl.program_id(1).to(tl.int64) * width + column
    tl.store(totals + at, total, mask=inside)
    tl.store(products + at, product, mask=inside)


@triton.jit
def standardize_finish_kernel(
    totals, products, squares, counts,  # [RUNS, D], [RUNS, D], [D]; [2] or None
    mean, slope,  # [D]: the mean of grad, and the factor of the result that the gradient subtracts
    rows, width, runs, dof,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK columns, and adds up the runs of rows in their order: in float64, since they are few.
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float64)
    product = tl.zeros((BLOCK,), tl.float64)
    for run in range(runs):
        at = tl.cast(run, tl.int64) * width + column
        total += tl.load(totals + at, mask=inside, other=0).to(tl.float64)
        product += tl.load(products + at, mask=inside, other=0).to(tl.float64)
    if counts is not None:
        rows = tl.load(counts)
        dof = rows - 1
    sigma = deviation(tl.load(squares + column, mask=inside, other=1), dof, 0.0, ACC)
    # The deviation of a constant column has a gradient of 0, as in torch.
    column_slope = tl.where(sigma == 0, 0, product.to(ACC) / (tl.cast(dof, ACC) * sigma))
    tl.store(mean + column, (total / tl.cast(rows, tl.float64)).to(ACC), mask=inside)
    tl.store(slope + column, column_slope, mask=inside)


@triton.jit
def gradient_of_columns(
    grad, out, squares, mean, slope, row, column, rows, width, dof, EPS: tl.constexpr, ACC: tl.constexpr
):
    """Compute a tile of the gradient with respect to the columns before they were standardised."""
    inside = column < width
    g = load_rows(grad, None, width, row, column, rows, inside, ACC)
    y = load_rows(out, None, width, row, column, rows, inside, ACC)
    square = tl.load(squares + column, mask=inside, other=1)
    divisor = deviation(square, dof, 0.0, ACC) + tl.full((), EPS, ACC)
    mean = tl.load(mean + column, mask=inside, other=0)
    slope = tl.load(slope + column, mask=inside, other=0)
    live = (row < rows)[:, None] & inside[None, :]
    return tl.where(live, (g - mean[None, :]) / divisor[None, :] - y * slope[None, :], 0)


@triton.jit
def standardize_bwd_kernel(
    grad, out, x, weight, counts, factors,  # [N, D], the last dimension of x contiguous; factors [N] or None
    squares, mean, slope,  # [D]
    grad_x,  # [N, D] contiguous
    stride, rows, width, dof,
    EPS: tl.constexpr, NORM_EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_N rows. If they were divided by their norms, it reads each row twice: first for the
    # projection of the gradient onto the row.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    read = skip_rows(weight, row, rows)
    if counts is not None:
        dof = tl.load(counts) - 1
    if factors is not None:
        factor = tl.load(factors + read, mask=read < rows, other=0)
        square = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        product = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        for start in range(0, width, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            g = gradient_of_columns(grad, out, squares, mean, slope, read, column, rows, width, dof, EPS, ACC)
            value = load_rows(x, None, stride, read, column, rows, column < width, ACC)
            square += value * value
            product += g * (value * factor[:, None])
        # A clamped norm is a constant.
        clamped = tl.sqrt(tl.sum(square, 1)) < tl.full((), NORM_EPS, ACC)
        projection = tl.where(clamped, 0, tl.sum(product, 1))
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        g = gradient_of_columns(grad, out, squares, mean, slope, read, column, rows, width, dof, EPS, ACC)
        if factors is not None:
            unit = load_rows(x, factors, stride, read, column, rows, column < width, ACC)
            g = (g - unit * projection[:, None]) * factor[:, None]
        live = (row < rows)[:, None] & (column < width)[None, :]
        store(grad_x + row[:, None] * width + column[None, :], g, live)
