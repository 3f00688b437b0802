"""Columns standardised over all rows, of rows as they are or divided by their norms. See ops/standardize.py."""

import triton
import triton.language as tl

from .columns import deviation, load_pivot, load_rows
from .cosine import inverse
from .store import store


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
    x, factors,  # [N, D], last dimension contiguous; [N] or None
    shift, squares,  # [D]: the means beside the first row, in float64, and the sums of squares about them
    out,  # [N, D] contiguous
    stride, rows, width, spare,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of the result.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    value = load_rows(x, factors, stride, row, column, rows, inside, ACC)
    pivot = load_pivot(x, factors, column, inside, ACC)
    mean = pivot.to(tl.float64) + tl.load(shift + column, mask=inside, other=0)
    near = mean.to(ACC)  # and what its rounding takes: a large mean's last digit is a large part of small deviations
    away = (value - near[None, :]) - (mean - near.to(tl.float64)).to(ACC)[None, :]
    square = tl.load(squares + column, mask=inside, other=1)
    divisor = deviation(square, spare, 0.0, ACC) + tl.full((), EPS, ACC)
    live = (row < rows)[:, None] & inside[None, :]
    tl.store(out + row[:, None] * width + column[None, :], away / divisor[None, :], mask=live)


@triton.jit
def standardize_sums_kernel(
    grad, out,  # [N, D] contiguous: of the result, and the result
    totals, along,  # [RUNS, D]: sums of grad, and of grad * out
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
    tl.store(along + at, product, mask=inside)


@triton.jit
def standardize_finish_kernel(
    totals, along, squares,  # [RUNS, D], [RUNS, D], [D]
    mean, share,  # [D]: of grad; and by how much of the result the gradient is less
    rows, width, runs, spare,
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
        product += tl.load(along + at, mask=inside, other=0).to(tl.float64)
    sigma = deviation(tl.load(squares + column, mask=inside, other=1), spare, 0.0, ACC)
    # The deviation of a constant column has a gradient of 0, as in torch.
    less = tl.where(sigma == 0, 0, product.to(ACC) / (tl.cast(spare, ACC) * sigma))
    tl.store(mean + column, (total / tl.cast(rows, tl.float64)).to(ACC), mask=inside)
    tl.store(share + column, less, mask=inside)


@triton.jit
def gradient_of_columns(
    grad, out, squares, mean, share, row, column, rows, width, spare, EPS: tl.constexpr, ACC: tl.constexpr
):
    """A tile of the gradient to what the columns were before: rows as they are, or of length one."""
    inside = column < width
    g = load_rows(grad, None, width, row, column, rows, inside, ACC)
    y = load_rows(out, None, width, row, column, rows, inside, ACC)
    square = tl.load(squares + column, mask=inside, other=1)
    divisor = deviation(square, spare, 0.0, ACC) + tl.full((), EPS, ACC)
    mean = tl.load(mean + column, mask=inside, other=0)
    share = tl.load(share + column, mask=inside, other=0)
    live = (row < rows)[:, None] & inside[None, :]
    return tl.where(live, (g - mean[None, :]) / divisor[None, :] - y * share[None, :], 0)


@triton.jit
def standardize_bwd_kernel(
    grad, out, x, factors,  # [N, D]; of x the last dimension contiguous, factors [N] or None
    squares, mean, share,  # [D]
    grad_x,  # [N, D] contiguous
    stride, rows, width, spare,
    EPS: tl.constexpr, NORM_EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_N rows. Where they were divided by their norms, it first reads them for what the gradient
    # has along each.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if factors is not None:
        factor = tl.load(factors + row, mask=row < rows, other=0)
        square = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        product = tl.zeros((BLOCK_N, BLOCK_D), ACC)
        for start in range(0, width, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            g = gradient_of_columns(grad, out, squares, mean, share, row, column, rows, width, spare, EPS, ACC)
            value = load_rows(x, None, stride, row, column, rows, column < width, ACC)
            square += value * value
            product += g * (value * factor[:, None])
        # A clamped norm is a constant, and has no share in the gradient.
        clamped = tl.sqrt(tl.sum(square, 1)) < tl.full((), NORM_EPS, ACC)
        along = tl.where(clamped, 0, tl.sum(product, 1))
    for start in range(0, width, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        g = gradient_of_columns(grad, out, squares, mean, share, row, column, rows, width, spare, EPS, ACC)
        if factors is not None:
            unit = load_rows(x, factors, stride, row, column, rows, column < width, ACC)
            g = (g - unit * along[:, None]) * factor[:, None]
        live = (row < rows)[:, None] & (column < width)[None, :]
        store(grad_x + row[:, None] * width + column[None, :], g, live)
