"""VICReg's symmetric product by tiles, of rows or of columns. See ops/vicreg.py."""

import triton
import triton.language as tl

NARROW = tl.constexpr(16)  # of a step that is loaded element by element: the least that a matrix instruction takes


@triton.jit
def mean_of(student, shift, column, live, ACC: tl.constexpr):
    """The columns' means: the first row plus their distance from it."""
    pivot = tl.load(student + column, mask=live, other=0).to(ACC)
    return pivot + tl.load(shift + column, mask=live, other=0)


@triton.jit
def load_centred(student, shift, stride, row, column, live, ACC: tl.constexpr):
    """y - mean. The first row goes off before the shift: a large mean, rounded, would swamp small deviations."""
    y = tl.load(student + row * stride + column, mask=live, other=0).to(ACC)
    pivot = tl.load(student + column, mask=live, other=0).to(ACC)
    return tl.where(live, y - pivot - tl.load(shift + column, mask=live, other=0), 0)


@triton.jit
def in_product(column, largest):
    """Whether a column is in the product: by rows the largest is not, and by columns there is none (None)."""
    if largest is None:
        return column >= 0
    else:
        return column != tl.load(largest)


@triton.jit
def means_are_large(student, shift, squares, largest, rows, width, GRAM: tl.constexpr, BLOCK: tl.constexpr):
    """Whether taking the means off after the product cancels: by rows those of its columns, by columns any one."""
    excess = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        live = (column < width) & in_product(column, largest)
        mean = mean_of(student, shift, column, live, tl.float32)
        variance = tl.load(squares + column, mask=live, other=0) / rows
        if GRAM:
            excess += mean * mean - variance
        else:
            excess += tl.where(mean * mean > variance, 1.0, 0.0)
    return tl.sum(excess, 0) > 0


@triton.jit
def finish_tile(
    acc, product, sums, i, j, row, column, size, dof, GRAM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the product over N - 1 and its mirror image, and the sum of their squares."""
    live = (row < size)[:, None] & (column < size)[None, :]
    value = tl.where(live, acc / tl.cast(dof, ACC), 0)
    if not GRAM:  # the diagonal is no part of the covariance
        value = tl.where(row[:, None] == column[None, :], 0, value)
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    tl.store(product + at, value, mask=live)
    mirror = column.to(tl.int64)[:, None] * size + row[None, :]
    tl.store(product + mirror, tl.trans(value), mask=tl.trans(live) & (i != j))
    # In float64 as soon as they are few: the columns' own squares are subtracted from their sum.
    square = tl.sum(tl.sum(value * value, 1).to(tl.float64), 0)
    tl.store(sums + i * tl.num_programs(1) + j, tl.where(i == j, square, 2 * square))


@triton.jit
def block_of(largest, first, last, BLOCK_K: tl.constexpr):
    """The block (start, end) of columns that has the largest; an empty one where [first, last) has it not."""
    p = tl.load(largest)
    start = p - (p - first) % BLOCK_K
    there = (p >= first) & (p < last)
    return tl.where(there, start, last), tl.where(there, tl.minimum(start + BLOCK_K, last), last)


@triton.jit
def add_product(acc, a, b, one, PRECISION: tl.constexpr, ACC: tl.constexpr, less=None):
    """acc + a b, added in registers: a matrix unit that is not IEEE's cuts its sums toward zero, which a chain adds up.

    one: 1, which the compiler does not know, or it would add within the unit after all. less: what a, rounded, lacks.
    """
    IEEE: tl.constexpr = PRECISION == "ieee"
    begin = acc if IEEE else None
    if less is not None:
        begin = tl.dot(less, b, begin, input_precision=PRECISION, out_dtype=ACC)
    product = tl.dot(a, b, begin, input_precision=PRECISION, out_dtype=ACC)
    return product if IEEE else acc + product * one


@triton.jit
def centred_step(
    acc, one, student, shift, largest, stride, left, right, size, start, last,
    GRAM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """acc + what BLOCK_K columns or rows have of a tile of xc xc^T or xc^T xc, but for the column `largest`."""
    k = start + tl.arange(0, BLOCK_K)
    live_b = (k < last)[:, None] & (right < size)[None, :]
    live_a = (left < size)[:, None] & (k < last)[None, :]
    if largest is not None:
        live_a &= (k != tl.load(largest))[None, :]
    if GRAM:
        a = load_centred(student, shift, stride, left.to(tl.int64)[:, None], k[None, :], live_a, ACC)
        b = load_centred(student, shift, stride, right.to(tl.int64)[None, :], k[:, None], live_b, ACC)
    else:
        row = k.to(tl.int64)
        a = load_centred(student, shift, stride, row[None, :], left[:, None], live_a, ACC)
        b = load_centred(student, shift, stride, row[:, None], right[None, :], live_b, ACC)
    return add_product(acc, a, b, one, PRECISION, ACC)


@triton.jit
def centred_product(
    one, student, shift, largest, stride, left, right, size, first, last,
    GRAM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of xc xc^T or xc^T xc, of rows that lose their means before they meet."""
    acc = tl.zeros((left.shape[0], right.shape[0]), ACC)
    skipped = last
    if GRAM:  # the block with the largest column comes last: a mask in every step would leave no vector loads
        skipped, end = block_of(largest, first, last, BLOCK_K)
    for start in range(first, tl.where(skipped < last, last - BLOCK_K, last), BLOCK_K):
        start += tl.where(start >= skipped, BLOCK_K, 0)
        acc = centred_step(
            acc, one, student, shift, None, stride, left, right, size, start, last, GRAM, PRECISION, BLOCK_K, ACC
        )
    if GRAM:
        for start in range(skipped, end, NARROW):
            acc = centred_step(
                acc, one, student, shift, largest, stride, left, right, size, start, last, GRAM, PRECISION, NARROW, ACC
            )
    return acc


@triton.jit
def raw_step(
    acc, dot_a, dot_b, mean_square, one, student, shift, largest, stride, left, right, size, start, last,
    GRAM: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of rows of 16 bits as they are; dot_a, dot_b: <y, mean> of both sides."""
    k = start + tl.arange(0, BLOCK_K)
    live = k < last
    if largest is not None:
        live &= k != tl.load(largest)
    live_a = (left < size)[:, None] & live[None, :]
    live_b = live[:, None] & (right < size)[None, :]
    if GRAM:
        a = tl.load(student + left.to(tl.int64)[:, None] * stride + k[None, :], mask=live_a, other=0)
        b = tl.load(student + right.to(tl.int64)[None, :] * stride + k[:, None], mask=live_b, other=0)
        mean = mean_of(student, shift, k, live, tl.float32)
        dot_a += tl.sum(a.to(tl.float32) * mean[None, :], 1)
        dot_b += tl.sum(b.to(tl.float32) * mean[:, None], 0)
        mean_square += mean * mean
    else:
        row = k.to(tl.int64)
        a = tl.load(student + row[None, :] * stride + left[:, None], mask=live_a, other=0)
        b = tl.load(student + row[:, None] * stride + right[None, :], mask=live_b, other=0)
    acc = add_product(acc, a.to(OPERAND), b.to(OPERAND), one, PRECISION, tl.float32)
    return acc, dot_a, dot_b, mean_square


@triton.jit
def raw_product(
    one, student, shift, largest, stride, left, right, size, first, last,
    GRAM: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of rows of 16 bits as they are, whose products float32 holds exactly; the means come off after it."""
    acc = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    dot_a = tl.zeros((left.shape[0],), tl.float32)
    dot_b = tl.zeros((right.shape[0],), tl.float32)
    mean_square = tl.zeros((BLOCK_K,), tl.float32)
    skipped = last
    if GRAM:
        skipped, end = block_of(largest, first, last, BLOCK_K)
    for start in range(first, tl.where(skipped < last, last - BLOCK_K, last), BLOCK_K):
        start += tl.where(start >= skipped, BLOCK_K, 0)
        acc, dot_a, dot_b, mean_square = raw_step(
            acc, dot_a, dot_b, mean_square, one, student, shift, None, stride, left, right, size, start, last,
            GRAM, OPERAND, PRECISION, BLOCK_K,
        )  # fmt: skip
    if GRAM:
        narrow = tl.zeros((NARROW,), tl.float32)
        for start in range(skipped, end, NARROW):
            acc, dot_a, dot_b, narrow = raw_step(
                acc, dot_a, dot_b, narrow, one, student, shift, largest, stride, left, right, size, start, last,
                GRAM, OPERAND, PRECISION, NARROW,
            )  # fmt: skip
        return acc - dot_a[:, None] - dot_b[None, :] + (tl.sum(mean_square, 0) + tl.sum(narrow, 0))
    else:
        mean_a = mean_of(student, shift, left, left < size, tl.float32)
        mean_b = mean_of(student, shift, right, right < size, tl.float32)
        return acc - mean_a[:, None] * mean_b[None, :] * (last - first).to(tl.float32)


@triton.jit
def vicreg_product_kernel(
    student,  # [N, D], last dimension contiguous
    shift, squares,  # [D]
    largest,  # [], the column that is left out (GRAM), or None
    product,  # [size, size], or [SPLITS, size, size], of which only the tiles from the diagonal on are written
    sums,  # [tiles, tiles], float64
    stride, rows, width, size, depth, depth_a_split, dof,
    GRAM: tl.constexpr, SPLIT: tl.constexpr, RAW: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of xc xc^T (GRAM) or xc^T xc, and one split of the columns or rows that it sums over.
    # RAW, for 16 bits: the means come off after the product, unless they are so large that this would cancel.
    i = tl.program_id(0)
    j = tl.program_id(1)
    if i > j:
        if not SPLIT:
            tl.store(sums + i * tl.num_programs(1) + j, 0.0)
        return
    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    first = tl.program_id(2) * depth_a_split
    last = tl.minimum(first + depth_a_split, depth)
    one = tl.where(depth > 0, 1.0, 0.0)
    if RAW:
        if means_are_large(student, shift, squares, largest, rows, width, GRAM, 1024):
            acc = centred_product(
                one, student, shift, largest, stride, left, right, size, first, last, GRAM, PRECISION, BLOCK_K // 2, ACC
            )
        else:
            acc = raw_product(
                one, student, shift, largest, stride, left, right, size, first, last, GRAM, OPERAND, PRECISION, BLOCK_K
            )
    else:
        acc = centred_product(
            one, student, shift, largest, stride, left, right, size, first, last, GRAM, PRECISION, BLOCK_K, ACC
        )
    if SPLIT:
        live = (left < size)[:, None] & (right < size)[None, :]
        at = (tl.program_id(2).to(tl.int64) * size + left.to(tl.int64)[:, None]) * size + right[None, :]
        tl.store(product + at, acc, mask=live)
    else:
        finish_tile(acc, product, sums, i, j, left, right, size, dof, GRAM, ACC)


@triton.jit
def vicreg_reduce_kernel(
    parts,  # [splits, size, size]
    product,  # [size, size]
    sums,  # [tiles, tiles], float64
    size, splits, dof,
    GRAM: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile, and adds up its splits in their order.
    i = tl.program_id(0)
    j = tl.program_id(1)
    if i > j:
        tl.store(sums + i * tl.num_programs(1) + j, 0.0)
        return
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    live = (row < size)[:, None] & (column < size)[None, :]
    acc = tl.zeros((TILE, TILE), ACC)
    for split in range(splits):
        at = (tl.cast(split, tl.int64) * size + row.to(tl.int64)[:, None]) * size + column[None, :]
        acc += tl.load(parts + at, mask=live, other=0)
    finish_tile(acc, product, sums, i, j, row, column, size, dof, GRAM, ACC)
