"""Column statistics: means, and sums of squares about them, by runs of rows that are merged in their order."""

import triton
import triton.language as tl


@triton.jit
def deviation(square, divisor, EPS: tl.constexpr, ACC: tl.constexpr):
    return tl.sqrt(square / tl.cast(divisor, ACC) + tl.full((), EPS, ACC))


@triton.jit
def load_rows(x, factors, stride, row, column, last, inside, ACC: tl.constexpr):
    """Loads a tile of rows before `last`, upcast right at the load, times their factors; None is 1."""
    live = (row < last)[:, None] & inside[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], mask=live, other=0).to(ACC)
    if factors is not None:
        value *= tl.load(factors + row, mask=row < last, other=0)[:, None]
    return value


@triton.jit
def load_pivot(x, factors, column, inside, ACC: tl.constexpr):
    """Loads the first row, from which means are measured: a large mean, rounded, would swamp small deviations."""
    pivot = tl.load(x + column, mask=inside, other=0).to(ACC)
    if factors is not None:
        pivot *= tl.load(factors)
    return pivot


@triton.jit
def column_statistics_kernel(
    x, other,  # [N, D], last dimension contiguous; other None without the errors
    factors,  # [N], of the rows of x; None is 1
    means, squares,  # [SPLITS, D]: of these rows, measured from the first row of all; about their own mean
    errors,  # [SPLITS, D]: sums of (x - other)^2
    stride_x, stride_other, rows, width, rows_a_split,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns of one run of rows, and merges its blocks' means and squares (Chan et al.): the
    # sum of squares less the squared sum would cancel. It takes the first block's mean off before, so that neither a
    # large mean nor a first row far from it swamps what is summed.
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    inside = column < width
    first = tl.program_id(1) * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    pivot = load_pivot(x, factors, column, inside, ACC)
    row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)  # int64: row * stride passes 2**31
    live = (row < last)[:, None] & inside[None, :]
    y = load_rows(x, factors, stride_x, row, column, last, inside, ACC)
    near = pivot + tl.sum(tl.where(live, y - pivot[None, :], 0), 0) / tl.minimum(last - first, BLOCK_N).to(ACC)
    mean = tl.zeros((BLOCK_D,), ACC)
    square = tl.zeros((BLOCK_D,), ACC)
    error = tl.zeros((BLOCK_D,), ACC)
    for start in range(first, last, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        live = (row < last)[:, None] & inside[None, :]
        y = load_rows(x, factors, stride_x, row, column, last, inside, ACC)
        centred = tl.where(live, y - near[None, :], 0)
        here = tl.minimum(last - start, BLOCK_N).to(ACC)
        before = (start - first).to(ACC)
        block_mean = tl.sum(centred, 0) / here
        away = tl.where(live, centred - block_mean[None, :], 0)
        step = block_mean - mean
        mean += step * (here / (before + here))
        # In this order: an overflowing square times the first block's 0 would be NaN.
        square += tl.sum(away * away, 0) + step * (step * (before * here / (before + here)))
        if other is not None:
            g = load_rows(other, None, stride_other, row, column, last, inside, ACC)
            error += tl.sum((y - g) * (y - g), 0)
    shift = mean.to(tl.float64) + (near.to(tl.float64) - pivot.to(tl.float64))
    tl.store(means + split * width + column, shift, mask=inside)
    tl.store(squares + split * width + column, square, mask=inside)
    if other is not None:
        tl.store(errors + split * width + column, error, mask=inside)


@triton.jit
def column_merge_kernel(
    means, squares,  # [splits, D]
    shift, total,  # [D]
    rows, width, rows_a_split, splits,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK columns, and merges the runs of rows in their order: in float64, since they are few.
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    mean = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * width + column
        before = tl.cast(split * rows_a_split, tl.float64)
        here = tl.cast(tl.minimum(rows - split * rows_a_split, rows_a_split), tl.float64)
        step = tl.load(means + at, mask=inside, other=0).to(tl.float64) - mean
        mean += step * (here / (before + here))
        part = tl.load(squares + at, mask=inside, other=0).to(tl.float64)
        square += part + step * (step * (before * here / (before + here)))
    tl.store(shift + column, mean, mask=inside)
    tl.store(total + column, square.to(ACC), mask=inside)
