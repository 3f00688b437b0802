"""VICReg's product, summed and stored for the gradient, and the loss. See ops/vicreg.py."""

import triton
import triton.language as tl

from .columns import is_last
from .vicreg import load_centred, mean_of, place_of, store_planes, store_terms, weight_of
from .vicreg_product import pair_of, place_in


@triton.jit
def add_rows(x, rows, stride, column, inside):
    """Adds up the rows of x [rows, stride] in some columns: 16 at a time, whose loads overlap."""
    total = tl.zeros((column.shape[0],), x.dtype.element_ty)
    for start in range(0, rows, 16):
        row = start + tl.arange(0, 16)
        live = (row < rows)[:, None] & inside[None, :]
        total += tl.sum(tl.load(x + row[:, None] * stride + column[None, :], mask=live, other=0), 0)
    return total


@triton.jit
def as_bfloat16(pointer):
    """Reads the memory of a product as planes: it was made for float16, which multiplies rows as they are."""
    return pointer.to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit
def add_splits(parts, splits, numbers, at, live, ACC: tl.constexpr):
    """Adds up a piece of the splits of a product: 4 at a time, whose loads overlap."""
    acc = tl.zeros((at.shape[0], at.shape[1]), ACC)
    for start in range(0, splits, 4):
        for step in tl.static_range(4):
            split = start + step
            acc += tl.load(parts + split.to(tl.int64) * numbers + at, mask=live & (split < splits), other=0)
    return acc


@triton.jit
def vicreg_part_kernel(
    parts,  # [SPLITS, D, D]: see vicreg_product_kernel; the first becomes their sum, about the mean of all ranks' rows
    student, shift, largest,  # [N, D], [D], [3]: see vicreg_statistics_kernel
    away,  # [D], from the mean of these rows to that of all ranks'
    rows, size, splits, RAW: tl.constexpr, PIECE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns a piece of the product on or above the diagonal.
    i, j = pair_of(tl.program_id(0), tl.cdiv(size, PIECE))
    row = i * PIECE + tl.arange(0, PIECE)
    column = j * PIECE + tl.arange(0, PIECE)
    live = (row < size)[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    acc = add_splits(parts, splits, tl.cast(size, tl.int64) * size, at, live, ACC)
    count = tl.cast(rows, ACC)
    if RAW and tl.load(largest) < 0:
        a = mean_of(student, shift, row, row < size, ACC)
        b = mean_of(student, shift, column, column < size, ACC)
        acc -= a[:, None] * b[None, :] * count
    a = tl.load(away + row, mask=row < size, other=0)
    b = tl.load(away + column, mask=column < size, other=0)
    acc += a[:, None] * b[None, :] * count
    tl.store(parts + at, acc, mask=live)


@triton.jit
def is_first_plane_enough(facts, covariance, weights, inv_weight, var_weight, cov_weight, rows, width, divisor):
    """Whether the rest of P after its first plane is below the gradient's rounding, whatever the student is.

    The norms are over all elements, and u is half of a last digit. The norm of the invariance's gradient is 2
    sqrt(invariance / (N d)), that of the variance's at most 1 / sqrt(d n), and that of the covariance's at most 2 C
    with C = 4 |P| |xc| / (D n). Rows as they are have at most sqrt(2) |xc|, so the rest adds at most sqrt(2) u C. It
    may be a quarter of u times the whole. NaN gives False. By rows |P|^2 contains the squares of s / n, too.
    """
    n = tl.maximum(rows - 1, 1)
    d = tl.cast(width, tl.float32)
    squared = covariance.to(tl.float32) + tl.load(facts + 5).to(tl.float32) / n / n
    of_errors = 2 * tl.sqrt(tl.load(facts).to(tl.float32) / rows / d)
    of_errors *= tl.abs(weight_of(weights, 0, inv_weight, tl.float32))
    of_variance = tl.abs(weight_of(weights, 1, var_weight, tl.float32)) / tl.sqrt(d * n)
    c = 4 * tl.abs(weight_of(weights, 2, cov_weight, tl.float32)) / (tl.cast(divisor, tl.float32) * n)
    return 8 * c * tl.sqrt(squared) * tl.sqrt(tl.load(facts + 4).to(tl.float32)) <= of_errors - of_variance


@triton.jit
def vicreg_finish_kernel(
    parts, row_sums,  # see vicreg_product_kernel
    student, shift, squares, facts, largest,  # [N, D], [D], [D], [7], [3]: see vicreg_statistics_kernel
    crosses,  # [RUNS, D]: see vicreg_planes_kernel
    about,  # [D], what rows are multiplied less, where those of other ranks are in the product; else None
    product,  # [padded, PLANES * padded]: planes of the product over N - 1, times the scale of the facts
    planes,  # see vicreg_planes_kernel; gets the largest column, which the product has left out (GRAM)
    dots,  # [pieces of a row, D], of the product and what rows are multiplied less; None where that is nothing
    cross,  # [D] (GRAM)
    sums, ticket,  # [programs], float64; a zero, which is left zero
    weights,  # [3] or None
    loss, invariance, variance, covariance,  # [], or None
    stride, stride_planes, stride_product, pieces,
    low, own,  # see vicreg_product_kernel
    width, size, splits, sums_of_rows, runs, divisor, inv_weight, var_weight, cov_weight,
    GRAM: tl.constexpr, RAW: tl.constexpr, PLANES: tl.constexpr, X_PLANES: tl.constexpr, PIECE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    # One program owns a piece of the product on or above the diagonal, and its mirror image: small ones, so that many
    # loads are in flight. The one that finishes last makes the loss of what all have summed. Where own rows meet all
    # rows, it owns any piece and no other.
    PART: tl.constexpr = low is not None
    i, j = place_in(tl.program_id(0), pieces, PART)
    row = i * PIECE + tl.arange(0, PIECE)
    column = j * PIECE + tl.arange(0, PIECE)
    inside = row < own
    live = inside[:, None] & (column < size)[None, :]
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    p = tl.load(largest)
    if GRAM and (i == 0) & (p >= 0):  # the gradient multiplies the largest column too
        far = column.to(tl.int64)
        x_p = load_centred(student, shift, stride, far, p + 0 * far, column < size, ACC)
        store_planes(planes + far * stride_planes + place_of(p, 1, X_PLANES), x_p, column < size, X_PLANES)
    acc = add_splits(parts, splits, tl.cast(own, tl.int64) * size, at, live, ACC)
    left = row
    if PART:
        left += low
    rows = tl.load(largest + 1).to(ACC)
    dof = tl.maximum(rows - 1, 1)
    if RAW and p < 0:  # what the means have brought in
        if GRAM:
            a = add_rows(row_sums, sums_of_rows, size, left, inside) / rows
            b = add_rows(row_sums, sums_of_rows, size, column, column < size) / rows
            acc -= a[:, None] + b[None, :] - tl.load(facts + 2).to(tl.float32)
        else:
            a = mean_of(student, shift, row, row < size, tl.float32)
            b = mean_of(student, shift, column, column < size, tl.float32)
            acc -= a[:, None] * b[None, :] * rows
    value = tl.where(live, acc / dof, 0)
    if not GRAM:  # the diagonal is no part of the covariance
        value = tl.where(row[:, None] == column[None, :], 0, value)
    if dots is not None:
        if about is not None:
            x_left = tl.load(about + row, mask=inside, other=0)
            x_right = tl.load(about + column, mask=column < size, other=0)
        else:
            x_left = tl.where(p < 0, mean_of(student, shift, row, inside, ACC), 0)
            x_right = tl.where(p < 0, mean_of(student, shift, column, column < size, ACC), 0)
        tl.store(dots + i * size + column, tl.sum(value * x_left[:, None], 0), mask=column < size)
        tl.store(dots + j * size + row, tl.sum(value * x_right[None, :], 1), mask=inside & (i != j))
    off_diagonal = (i != j) & (not PART)
    # In float64 as soon as they are few: the columns' own squares are subtracted from their sum.
    square = tl.sum(tl.sum(value * value, 1).to(tl.float64), 0)
    tl.store(sums + tl.program_id(0), tl.where(off_diagonal, 2 * square, square))
    if product.dtype.element_ty == tl.float16:
        value *= tl.load(facts + 3).to(tl.float32)
    side = tl.arange(0, PIECE)
    at = row.to(tl.int64)[:, None] * stride_product + (place_of(j * PIECE, PIECE, PLANES) + side)[None, :]
    mirror = column.to(tl.int64)[:, None] * stride_product + (place_of(i * PIECE, PIECE, PLANES) + side)[None, :]
    if product.dtype.element_ty == tl.float16 and p >= 0:
        store_planes(as_bfloat16(product) + at, value, True, PLANES)
        store_planes(as_bfloat16(product) + mirror, tl.trans(value), off_diagonal, PLANES)
    else:
        store_planes(product + at, value, True, PLANES)
        store_planes(product + mirror, tl.trans(value), off_diagonal, PLANES)
    if is_last(ticket):
        tl.store(ticket, 0)
        LANES: tl.constexpr = 1024
        lane = tl.arange(0, LANES)
        total = tl.zeros((LANES,), tl.float64)
        for start in range(0, tl.num_programs(0), LANES):
            total += tl.load(sums + start + lane, mask=start + lane < tl.num_programs(0), other=0)
        if GRAM:
            for start in range(0, width, LANES):
                each = start + lane
                there = each < width
                shared = tl.zeros((LANES,), ACC)
                for run in range(0, tl.where(p < 0, 0, runs)):
                    shared += tl.load(crosses + run * width + each, mask=there, other=0)
                tl.store(cross + each, shared, mask=there)
                alone = tl.load(squares + each, mask=there & (each != p), other=0) / dof
                twice = 2 * shared.to(tl.float64) * shared - alone.to(tl.float64) * alone
                if PART:  # of what all ranks subtract
                    twice *= tl.cast(own, tl.float64) / tl.load(largest + 1)
                total += twice
        energy = tl.sum(total, 0)
        tl.store(facts + 6, energy)
        if loss is not None:
            if RAW:
                enough = is_first_plane_enough(
                    facts, energy, weights, inv_weight, var_weight, cov_weight, rows, width, divisor
                )
                tl.store(largest + 2, enough.to(tl.int32))
            store_terms(
                tl.load(facts), tl.load(facts + 1), energy / tl.cast(divisor, tl.float64), weights,
                loss, invariance, variance, covariance, inv_weight, var_weight, cov_weight, ACC,
            )  # fmt: skip
