"""VICReg's symmetric product: of rows or of columns, by tiles from the diagonal on. See ops/vicreg.py."""

import triton
import triton.language as tl

from .columns import is_last
from .vicreg import BLOCK, load_centred, mean_of, place_of, store_planes, store_terms


@triton.jit
def pair_of(t, tiles):
    """Finds (i, j), i <= j, of the t-th tile of an upper triangle: no program is launched for the lower one."""
    i = 0
    left = t
    row = tiles
    while left >= row:
        left -= row
        row -= 1
        i += 1
    return i, i + left


@triton.jit
def place_in(t, tiles, PART: tl.constexpr):
    """Finds (i, j) of the t-th tile: of the upper triangle, or of own rows with all rows (PART)."""
    if PART:
        return t // tiles, t % tiles
    else:
        return pair_of(t, tiles)


@triton.jit
def load_operand(x, mask, OPERAND: tl.constexpr):
    if mask is None:
        return tl.load(x).to(OPERAND)
    else:
        return tl.load(x, mask=mask, other=0).to(OPERAND)


@triton.jit
def multiply(a, live_a, b, live_b, OPERAND: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Multiplies two sums of A and B planes, smallest products first; leaves out those below the last plane.

    It starts from 0: the matrix unit cuts each sum toward 0, and a chain of cuts over the whole depth is a bias.
    """
    acc = None
    a0 = load_operand(a, live_a, OPERAND)
    b0 = load_operand(b, live_b, OPERAND)
    if A > 1:
        a1 = load_operand(a + BLOCK, live_a, OPERAND)
    if B > 1:
        b1 = load_operand(b + BLOCK, live_b, OPERAND)
    if A > 2:
        acc = tl.dot(load_operand(a + 2 * BLOCK, live_a, OPERAND), b0, acc)
    if B > 2:
        acc = tl.dot(a0, load_operand(b + 2 * BLOCK, live_b, OPERAND), acc)
        acc = tl.dot(a1, b1, acc)
    if A > 1:
        acc = tl.dot(a1, b0, acc)
    if B > 1:
        acc = tl.dot(a0, b1, acc)
    return tl.dot(a0, b0, acc)


@triton.jit
def product_of_planes(
    x, stride, i, j, low, size, first, last, one,
    GRAM: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, PLANES: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Computes a tile of x x^T (GRAM) or x^T x from `first` to `last` of its depth. WHOLE: no tile has an end in it.

    low: the first row on the left, or None for the first of all.
    """
    acc = tl.zeros((TILE, TILE), tl.float32)
    side = tl.arange(0, TILE)
    lane = tl.arange(0, BLOCK_K)
    left = i * TILE + side
    right = j * TILE + side
    if low is not None:
        left += low
    if GRAM:
        if not WHOLE:  # rows past the last are read as the last: their products are masked where they are used
            left = tl.minimum(left, size - 1)
            right = tl.minimum(right, size - 1)
        a = left.to(tl.int64)[:, None] * stride
        b = right.to(tl.int64)[None, :] * stride
    else:
        a = lane.to(tl.int64)[None, :] * stride + (place_of(i * TILE, TILE, PLANES) + side)[:, None]
        b = lane.to(tl.int64)[:, None] * stride + (place_of(j * TILE, TILE, PLANES) + side)[None, :]
    for start in range(first, last, BLOCK_K):
        live_a = None
        live_b = None
        if not WHOLE:
            live_a = (lane < last - start)[None, :]
            live_b = (lane < last - start)[:, None]
            if not GRAM:
                live_a &= (left < size)[:, None]
                live_b &= (right < size)[None, :]
        # In this form the compiler needs fewest instructions for the addresses.
        if GRAM:
            k = place_of(start, BLOCK_K, PLANES) + lane
            at_a = a + k[None, :]
            at_b = b + k[:, None]
        else:
            step = tl.cast(start, tl.int64) * stride
            at_a = a + step
            at_b = b + step
        # Without the factor, 1 at run time, the compiler would add within the matrix unit after all.
        acc += multiply(x + at_a, live_a, x + at_b, live_b, OPERAND, PLANES, PLANES) * one
    return acc


@triton.jit
def product_of_centred(
    student, shift, largest, stride, left, right, size, first, last, GRAM: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Computes the same in float64, of rows that are centred as they are loaded."""
    acc = tl.zeros((left.shape[0], right.shape[0]), tl.float64)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_a = (left < size)[:, None] & (k < last)[None, :]
        live_b = (k < last)[:, None] & (right < size)[None, :]
        if GRAM:
            live_a &= (k != tl.load(largest))[None, :]
            a = load_centred(student, shift, stride, left.to(tl.int64)[:, None], k[None, :], live_a, tl.float64)
            b = load_centred(student, shift, stride, right.to(tl.int64)[None, :], k[:, None], live_b, tl.float64)
        else:
            row = k.to(tl.int64)
            a = load_centred(student, shift, stride, row[None, :], left[:, None], live_a, tl.float64)
            b = load_centred(student, shift, stride, row[:, None], right[None, :], live_b, tl.float64)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float64)
    return acc


@triton.jit
def vicreg_product_kernel(
    student, shift, largest,  # [N, D], last dimension contiguous; [D]; [2]: see vicreg_statistics_kernel
    planes,  # [padded N, PLANES * padded D]: see vicreg_planes_kernel; None for float64
    parts,  # [SPLITS, own, size]: tiles from the diagonal on, or all where own rows meet all rows
    row_sums,  # [SPLITS, tiles, size], of the product of rows as they are; None where the columns' means suffice
    stride, stride_planes,
    low, own,  # own rows of all the rows: the first, and how many; None and size where they are all
    size, depth, depth_a_split, tiles,
    GRAM: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr, PLANES: tl.constexpr,
    OPERAND: tl.constexpr, PLANE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, PLANES_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of xc xc^T (GRAM) or xc^T xc, and one split of the columns or rows that it sums over.
    # RAW, of 16 bits: rows are multiplied as they are, whose products float32 holds exactly, and the means come off in
    # vicreg_finish_kernel; planes take their place where that would cancel.
    PART: tl.constexpr = low is not None
    i, j = place_in(tl.program_id(0), tiles, PART)
    split = tl.program_id(1)
    row = i * TILE + tl.arange(0, TILE)
    left = row
    if PART:
        left += low
    right = j * TILE + tl.arange(0, TILE)
    first = split * depth_a_split
    last = tl.minimum(first + depth_a_split, depth)
    one = tl.where(depth > 0, 1.0, 0.0)
    live = (row < own)[:, None] & (right < size)[None, :]
    if planes is None:
        acc = product_of_centred(student, shift, largest, stride, left, right, size, first, last, GRAM, BLOCK_K)
    elif RAW:
        if tl.load(largest) < 0:
            acc = product_of_planes(
                student, stride, i, j, low, size, first, last, one, GRAM, WHOLE, OPERAND, 1, TILE, BLOCK_K
            )
            if GRAM:
                if not PART:
                    at = (split * tiles + j) * size + left
                    tl.store(row_sums + at, tl.sum(tl.where(live, acc, 0), 1), mask=left < size)
                if (i != j) | PART:
                    at = (split * tl.cdiv(own, TILE) + i) * size + right
                    tl.store(row_sums + at, tl.sum(tl.where(live, acc, 0), 0), mask=right < size)
        else:
            acc = product_of_planes(
                planes, stride_planes, i, j, low, size, first, last, one, GRAM, True, PLANE, PLANES, TILE, PLANES_K
            )
    else:
        acc = product_of_planes(
            planes, stride_planes, i, j, low, size, first, last, one, GRAM, True, PLANE, PLANES, TILE, PLANES_K
        )
    at = (split.to(tl.int64) * own + row.to(tl.int64)[:, None]) * size + right[None, :]
    tl.store(parts + at, acc, mask=live)


@triton.jit
def add_rows(x, rows, stride, column, inside):
    """Adds up the rows of x [rows, stride] in some columns, 16 at a time so that their loads are in flight together."""
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
    """Adds up a piece of the splits of a product, 4 at a time so that their loads are in flight together."""
    acc = tl.zeros((at.shape[0], at.shape[1]), ACC)
    for start in range(0, splits, 4):
        for step in tl.static_range(4):
            split = start + step
            acc += tl.load(parts + split.to(tl.int64) * numbers + at, mask=live & (split < splits), other=0)
    return acc


@triton.jit
def vicreg_part_kernel(
    parts,  # [SPLITS, D, D]: see vicreg_product_kernel; the first becomes their sum, about the mean of all ranks' rows
    student, shift, largest,  # [N, D], [D], [2]: see vicreg_statistics_kernel
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
    if RAW:
        as_it_is = tl.load(largest) < 0
        if as_it_is:
            a = mean_of(student, shift, row, row < size, ACC)
            b = mean_of(student, shift, column, column < size, ACC)
            acc -= a[:, None] * b[None, :] * count
    a = tl.load(away + row, mask=row < size, other=0)
    b = tl.load(away + column, mask=column < size, other=0)
    acc += a[:, None] * b[None, :] * count
    tl.store(parts + at, acc, mask=live)


@triton.jit
def vicreg_finish_kernel(
    parts, row_sums,  # see vicreg_product_kernel
    student, shift, squares, facts, largest,  # [N, D], [D], [D], [5], [2]: see vicreg_statistics_kernel
    crosses,  # [RUNS, D]: see vicreg_planes_kernel
    about,  # [D], what rows are multiplied less, where those of other ranks are in the product; else None
    product,  # [padded, PLANES * padded]: planes of the product over N - 1, times the scale of the facts
    dots,  # [pieces of a row, own]: of the product and x_p (GRAM), or of it and what rows are multiplied less; None
    cross,  # [D] (GRAM)
    sums, ticket,  # [programs], float64; a zero, which is left zero
    weights,  # [3] or None
    loss, invariance, variance, covariance,  # [], or None
    stride, stride_product, pieces,
    low, own,  # see vicreg_product_kernel
    width, size, splits, sums_of_rows, runs, divisor, inv_weight, var_weight, cov_weight,
    GRAM: tl.constexpr, RAW: tl.constexpr, PLANES: tl.constexpr, PIECE: tl.constexpr, ACC: tl.constexpr,
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
    acc = add_splits(parts, splits, tl.cast(own, tl.int64) * size, at, live, ACC)
    left = row
    if PART:
        left += low
    p = tl.load(largest)
    rows = tl.load(largest + 1).to(ACC)
    dof = tl.maximum(rows - 1, 1)
    if RAW:
        as_it_is = p < 0
        if as_it_is:  # what the means have brought in
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
    if GRAM:
        q = tl.maximum(p, 0)
        x_left = load_centred(student, shift, stride, left.to(tl.int64), q + 0 * row, inside, ACC)
        x_right = load_centred(student, shift, stride, column.to(tl.int64), q + 0 * column, column < size, ACC)
    elif about is not None:
        x_left = tl.load(about + row, mask=inside, other=0)
        x_right = tl.load(about + column, mask=column < size, other=0)
    elif dots is not None:
        x_left = tl.where(p < 0, mean_of(student, shift, row, inside, ACC), 0)
        x_right = tl.where(p < 0, mean_of(student, shift, column, column < size, ACC), 0)
    if dots is not None:
        if not PART:
            tl.store(dots + i * size + column, tl.sum(value * x_left[:, None], 0), mask=column < size)
        if (i != j) | PART:
            tl.store(dots + j * own + row, tl.sum(value * x_right[None, :], 1), mask=inside)
    side = tl.arange(0, PIECE)
    at = row.to(tl.int64)[:, None] * stride_product + (place_of(j * PIECE, PIECE, PLANES) + side)[None, :]
    mirror = column.to(tl.int64)[:, None] * stride_product + (place_of(i * PIECE, PIECE, PLANES) + side)[None, :]
    off_diagonal = (i != j) & (not PART)
    if tl.float64 == ACC:
        tl.store(product + row.to(tl.int64)[:, None] * size + column[None, :], value, mask=live)
        mirrored = tl.trans(live) & off_diagonal
        tl.store(product + column.to(tl.int64)[:, None] * size + row[None, :], tl.trans(value), mask=mirrored)
    elif product.dtype.element_ty == tl.float16:
        if p < 0:
            scaled = value * tl.load(facts + 3).to(tl.float32)
            store_planes(product + at, scaled, True, PLANES)
            store_planes(product + mirror, tl.trans(scaled), off_diagonal, PLANES)
        else:
            store_planes(as_bfloat16(product) + at, value, True, PLANES)
            store_planes(as_bfloat16(product) + mirror, tl.trans(value), off_diagonal, PLANES)
    else:
        store_planes(product + at, value, True, PLANES)
        store_planes(product + mirror, tl.trans(value), off_diagonal, PLANES)
    # In float64 as soon as they are few: the columns' own squares are subtracted from their sum.
    square = tl.sum(tl.sum(value * value, 1).to(tl.float64), 0)
    tl.store(sums + tl.program_id(0), tl.where(off_diagonal, 2 * square, square))
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
                inside = each < width
                shared = tl.zeros((LANES,), ACC)
                for run in range(0, tl.where(p < 0, 0, runs)):
                    shared += tl.load(crosses + run * width + each, mask=inside, other=0)
                tl.store(cross + each, shared, mask=inside)
                alone = tl.load(squares + each, mask=inside & (each != p), other=0) / dof
                twice = 2 * shared.to(tl.float64) * shared - alone.to(tl.float64) * alone
                if PART:  # of what all ranks subtract
                    twice *= tl.cast(own, tl.float64) / tl.load(largest + 1)
                total += twice
        energy = tl.sum(total, 0)
        tl.store(facts + 4, energy)
        if loss is not None:
            store_terms(
                tl.load(facts), tl.load(facts + 1), energy / tl.cast(divisor, tl.float64), weights,
                loss, invariance, variance, covariance, inv_weight, var_weight, cov_weight, ACC,
            )  # fmt: skip
