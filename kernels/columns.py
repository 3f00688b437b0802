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
def run_statistics(
    x, other, factors, column, inside, first, last, stride_x, stride_other, BLOCK_N: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Reduces one run of rows of some columns.

    Returns their means, measured from the first row of all, in float64; the sums of squares about those means; and the
    sums of (x - other)^2. It merges the means and squares of its blocks (Chan et al.), since the sum of squares less
    the squared sum would cancel. It subtracts the first block's mean before, so that neither a large mean nor an
    outlying first row costs digits.
    """
    pivot = load_pivot(x, factors, column, inside, ACC)
    row = (first + tl.arange(0, BLOCK_N)).to(tl.int64)  # int64: row * stride passes 2**31
    live = (row < last)[:, None] & inside[None, :]
    y = load_rows(x, factors, stride_x, row, column, last, inside, ACC)
    near = pivot + tl.sum(tl.where(live, y - pivot[None, :], 0), 0) / tl.minimum(last - first, BLOCK_N).to(ACC)
    mean = tl.zeros_like(near)
    square = tl.zeros_like(near)
    error = tl.zeros_like(near)
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
    return mean.to(tl.float64) + (near.to(tl.float64) - pivot.to(tl.float64)), square, error


@triton.jit
def store_run(
    x, other, factors, means, parts, rows, width, rows_a_run, stride_x, stride_other,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Reduces BLOCK_D columns of one run of rows, this program's, stores their statistics, and returns the errors."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    first = tl.program_id(1) * rows_a_run
    last = tl.minimum(first + rows_a_run, rows)
    mean, square, error = run_statistics(
        x, other, factors, column, inside, first, last, stride_x, stride_other, BLOCK_N, ACC
    )
    at = tl.program_id(1).to(tl.int64) * width + column
    tl.store(means + at, mean, mask=inside)
    tl.store(parts + at, square, mask=inside)
    return error


@triton.jit
def merge_runs(means, squares, column, inside, rows, width, rows_a_run, runs, RUNS: tl.constexpr):
    """Merges the runs of rows of some columns, all at once, and in float64, since runs are few."""
    run = tl.arange(0, RUNS)
    live = (run < runs)[:, None] & inside[None, :]
    at = run[:, None] * width + column[None, :]
    here = tl.maximum(tl.minimum(rows - run * rows_a_run, rows_a_run), 0).to(tl.float64)[:, None]
    part = tl.load(means + at, mask=live, other=0).to(tl.float64)
    mean = tl.sum(part * here, 0) / tl.cast(rows, tl.float64)
    # An overflowing square times 0 rows would be NaN.
    away = tl.where(live, part - mean[None, :], 0)
    square = tl.load(squares + at, mask=live, other=0).to(tl.float64) + away * (away * here)
    return mean, tl.sum(square, 0)


@triton.jit
def is_last(ticket):
    """Whether all other programs of the launch have come here before. Their results can then be loaded."""
    tl.debug_barrier()  # the atomic operation is one thread's, and releases what all have stored
    return tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1


@triton.jit
def column_statistics_kernel(
    x, factors,  # [N, D], last dimension contiguous; [N], of its rows; None is 1
    means, parts,  # [RUNS, D]: see run_statistics
    ticket,  # a zero, which is left zero
    shift, squares,  # [D]: the means, measured from the first row; the sums of squares about them
    stride, rows, width, rows_a_run, runs,
    RUNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns of one run of rows. The one that finishes last merges the runs.
    store_run(x, None, factors, means, parts, rows, width, rows_a_run, stride, 0, BLOCK_N, BLOCK_D, ACC)
    if is_last(ticket):
        tl.store(ticket, 0)
        LANES: tl.constexpr = 2048 // RUNS
        for start in range(0, width, LANES):
            each = start + tl.arange(0, LANES)
            there = each < width
            mean, square = merge_runs(means, parts, each, there, rows, width, rows_a_run, runs, RUNS)
            tl.store(shift + each, mean, mask=there)
            tl.store(squares + each, square.to(ACC), mask=there)
