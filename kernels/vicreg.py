"""The passes of VICReg that read the student: column statistics, and the planes to multiply. See ops/vicreg.py."""

import triton
import triton.language as tl

from .columns import deviation, is_last, merge_runs, store_run

LARGE_MEANS = tl.constexpr(1.0)  # squared, by the variance: beyond it a mean is subtracted before the product
DOMINANCE = tl.constexpr(4.0)
BLOCK = tl.constexpr(128)  # columns of a plane that lie together


@triton.jit
def mean_of(student, shift, column, live, ACC: tl.constexpr):
    """Returns the columns' means: the first row plus their distance from it."""
    pivot = tl.load(student + column, mask=live, other=0).to(ACC)
    return pivot + tl.load(shift + column, mask=live, other=0).to(ACC)


@triton.jit
def load_centred(student, shift, stride, row, column, live, ACC: tl.constexpr):
    """Loads y - mean. The first row is subtracted before the shift: a large mean, rounded, would swamp deviations."""
    y = tl.load(student + row * stride + column, mask=live, other=0).to(ACC)
    pivot = tl.load(student + column, mask=live, other=0).to(ACC)
    return tl.where(live, y - pivot - tl.load(shift + column, mask=live, other=0), 0)


@triton.jit
def place_of(column, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Returns where a tile of columns begins in a row of planes: 128 columns of each plane follow one another."""
    column = tl.cast(column, tl.int32)
    if PLANES == 1:
        place = column
    elif WIDTH == BLOCK:
        place = column * PLANES
    else:
        place = column // BLOCK * (BLOCK * PLANES) + column % BLOCK
    return tl.multiple_of(place, WIDTH)


@triton.jit
def store_planes(out, value, mask, PLANES: tl.constexpr):
    """Stores a tile as tiles of 16 bits that sum to it, each the rounded rest of those before; float64 as it is."""
    for i in tl.static_range(PLANES):
        part = value.to(out.dtype.element_ty)
        tl.store(out + i * BLOCK, part, mask=mask)
        value -= part.to(value.dtype)


@triton.jit
def weight_of(weights, index: tl.constexpr, number, ACC: tl.constexpr):
    """Returns a term's weight: the number, which is float32, or an element of the tensor of all three."""
    if weights is None:
        weight = tl.cast(number, ACC)
    else:
        weight = tl.load(weights + index).to(ACC)
    return weight


@triton.jit
def store_terms(
    inv, var, cov, weights, loss, invariance, variance, covariance, inv_weight, var_weight, cov_weight,
    ACC: tl.constexpr,
):  # fmt: skip
    inv = inv.to(ACC)
    var = var.to(ACC)
    cov = cov.to(ACC)
    tl.store(invariance, inv)
    tl.store(variance, var)
    tl.store(covariance, cov)
    weighted = weight_of(weights, 0, inv_weight, ACC) * inv + weight_of(weights, 1, var_weight, ACC) * var
    tl.store(loss, weighted + weight_of(weights, 2, cov_weight, ACC) * cov)


@triton.jit
def power_of_two(x):
    """Returns the largest power of two that is at most x > 0."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def vicreg_statistics_kernel(
    student, target,  # [N, D], last dimension contiguous; target None without the invariance
    means, parts, errors,  # [RUNS, D], [RUNS, D], [programs]: see run_statistics
    ticket,  # a zero, which is left zero
    shift, squares,  # [D]
    facts,  # [7] float64: invariance, variance, |mean|^2, what the product is multiplied by where it is stored, the sum
    # of s and of s^2, and the sum of squared covariances, which vicreg_finish_kernel adds
    largest,  # [3]: the column that deviates most, or -1 where rows of 16 bits can be multiplied as they are; N; and
    # whether the first plane of the product is enough, which vicreg_finish_kernel finds
    weights, loss, invariance, variance, covariance,  # see vicreg_finish_kernel; None where it stores the terms
    stride_student, stride_target, rows, width, rows_a_run, runs, over, inv_weight, var_weight, cov_weight,
    GAMMA: tl.constexpr, EPS: tl.constexpr, VARIANCE: tl.constexpr, GRAM: tl.constexpr, RAW: tl.constexpr,
    RUNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns of one run of rows. The one that finishes last merges the runs, and finds what
    # all columns together decide.
    error = store_run(
        student, target, None, means, parts, rows, width, rows_a_run, stride_student, stride_target,
        BLOCK_N, BLOCK_D, ACC,
    )  # fmt: skip
    if target is not None:
        tl.store(errors + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(error.to(tl.float64), 0))
    if is_last(ticket):
        tl.store(ticket, 0)
        LANES: tl.constexpr = 1024 // RUNS  # more would spill
        n = tl.cast(rows, tl.float64)
        gamma = tl.full((), GAMMA, ACC)
        hinge = tl.zeros((LANES,), tl.float64)
        total = tl.zeros((LANES,), tl.float64)
        fourth = tl.zeros((LANES,), tl.float64)
        mean_square = tl.zeros((LANES,), tl.float64)
        excess = tl.full((LANES,), -1, tl.float64)
        most = tl.full((LANES,), -1, ACC)
        which = tl.zeros((LANES,), tl.int32)
        for start in range(0, width, LANES):
            each = start + tl.arange(0, LANES)
            there = each < width
            centre, merged = merge_runs(means, parts, each, there, rows, width, rows_a_run, runs, RUNS)
            whole = merged.to(ACC)
            tl.store(shift + each, centre.to(ACC), mask=there)
            tl.store(squares + each, whole, mask=there)
            sigma = deviation(whole, over, EPS, ACC)
            # sigma >= gamma, and not the maximum of 0: a NaN must stay one.
            hinge += tl.where(there, tl.where(sigma >= gamma, 0, gamma - sigma), 0).to(tl.float64)
            # The first of several, and never a NaN.
            larger = there & (whole > most)
            most = tl.where(larger, whole, most)
            which = tl.where(larger, each, which)
            if RAW:
                centre += tl.load(student + each, mask=there, other=0).to(tl.float64)
                total += merged
                if GRAM:
                    mean_square += centre * centre
                    fourth += merged * merged
                else:
                    excess = tl.maximum(excess, centre * centre - merged * LARGE_MEANS / n)
        deviates = tl.max(most, 0)
        p = tl.min(tl.where(most == deviates, which, width - 1), 0)
        scale = tl.full((), 1, tl.float32)
        squared = tl.zeros((), tl.float64)
        if RAW:
            if GRAM:
                # The columns' own squares are subtracted from the product's. That cancels where a column dominates,
                # which only planes leave out.
                trace = tl.sum(total, 0)
                squared = tl.sum(mean_square, 0)
                fits = squared <= trace * LARGE_MEANS / n
                fits &= n * tl.sum(fourth, 0) <= trace * trace * DOMINANCE
            else:
                trace = deviates.to(tl.float64)
                fits = tl.max(excess, 0) <= 0
            fits &= trace < float("inf")
            p = tl.where(fits, -1, p)
            if student.dtype.element_ty == tl.float16:  # no element of the product is larger than this bound
                bound = (trace / n).to(tl.float32)
                scale = tl.where(fits & (bound > 0), 8192 / power_of_two(bound), 1)
        inv = tl.zeros((), tl.float64)
        if target is not None:
            wrong = tl.zeros((LANES,), tl.float64)
            count = tl.num_programs(0) * tl.num_programs(1)
            for start in range(0, count, LANES):
                lane = start + tl.arange(0, LANES)
                wrong += tl.load(errors + lane, mask=lane < count, other=0)
            inv = tl.sum(wrong, 0) / n / width
        var = tl.zeros((), tl.float64)
        if VARIANCE:
            var = tl.sum(hinge, 0) / width
        tl.store(largest, p)
        tl.store(largest + 1, rows)
        tl.store(largest + 2, 0)
        tl.store(facts, inv)
        tl.store(facts + 1, var)
        tl.store(facts + 2, squared)
        tl.store(facts + 3, scale.to(tl.float64))
        tl.store(facts + 4, tl.sum(total, 0))
        tl.store(facts + 5, tl.sum(fourth, 0))
        tl.store(facts + 6, tl.zeros((), tl.float64))
        if loss is not None:
            store_terms(
                inv, var, tl.zeros((), tl.float64), weights, loss, invariance, variance, covariance,
                inv_weight, var_weight, cov_weight, ACC,
            )  # fmt: skip


@triton.jit
def vicreg_planes_kernel(
    student, shift, largest,  # [N, D], last dimension contiguous; [D]; [3]
    planes,  # [padded N, PLANES * padded D]: xc as a sum of bfloat16 numbers, or itself; 0 in the largest column (GRAM)
    cross,  # [RUNS, D]: sums over runs of rows of x_p x_j / dof (GRAM)
    stride, stride_planes, rows, width, padded_rows, rows_a_run, dof,
    GRAM: tl.constexpr, PLANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns of one run of rows.
    p = tl.load(largest)
    if p >= 0:
        column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < width
        first = tl.program_id(1) * rows_a_run
        last = tl.minimum(first + rows_a_run, rows)
        end = tl.where(tl.program_id(1) == tl.num_programs(1) - 1, padded_rows, last)  # zeros to multiply
        total = tl.zeros((BLOCK_D,), ACC)
        for start in range(first, end, BLOCK_N):
            row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)  # int64: row * stride passes 2**31
            live = (row < last)[:, None] & inside[None, :]
            x = load_centred(student, shift, stride, row[:, None], column[None, :], live, ACC)
            if GRAM:
                x_p = load_centred(student, shift, stride, row, p + 0 * row, row < last, ACC)
                x = tl.where((column == p)[None, :], 0, x)
                total += tl.sum(x * x_p[:, None], 0)
            at = place_of(tl.program_id(0) * BLOCK_D, BLOCK_D, PLANES) + tl.arange(0, BLOCK_D)
            store_planes(planes + row[:, None] * stride_planes + at[None, :], x, True, PLANES)
        if GRAM:
            tl.store(cross + tl.program_id(1) * width + column, total / tl.cast(dof, ACC), mask=inside)
