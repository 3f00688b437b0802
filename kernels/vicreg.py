"""VICReg: a symmetric product by tiles, and the gradient as one more product. See ops/vicreg.py."""

import triton
import triton.language as tl

from .columns import deviation
from .store import store


@triton.jit
def mean_of(student, shift, column, live, ACC: tl.constexpr):
    """The columns' means: the first row plus what they lie beside it."""
    pivot = tl.load(student + column, mask=live, other=0).to(ACC)
    return pivot + tl.load(shift + column, mask=live, other=0)


@triton.jit
def load_centred(student, shift, stride, row, column, live, ACC: tl.constexpr):
    """y - mean. The first row goes off before the shift: a large mean, rounded, would swamp small deviations."""
    y = tl.load(student + row * stride + column, mask=live, other=0).to(ACC)
    pivot = tl.load(student + column, mask=live, other=0).to(ACC)
    return tl.where(live, y - pivot - tl.load(shift + column, mask=live, other=0), 0)


@triton.jit
def means_are_large(student, shift, squares, rows, width, GRAM: tl.constexpr, BLOCK: tl.constexpr):
    """Whether taking the means off after the product cancels: by rows those of all columns, by columns any one."""
    excess = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mean = mean_of(student, shift, column, column < width, tl.float32)
        variance = tl.load(squares + column, mask=column < width, other=0) / rows
        if GRAM:
            excess += mean * mean - variance
        else:
            excess += tl.where(mean * mean > variance, 1.0, 0.0)
    return tl.sum(excess, 0) > 0


@triton.jit
def finish_tile(
    acc, product, sums, i, j, row, column, size, spare, GRAM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the product over N - 1 and its mirror image, and the sum of their squares."""
    live = (row < size)[:, None] & (column < size)[None, :]
    value = tl.where(live, acc / tl.cast(spare, ACC), 0)
    if not GRAM:  # the diagonal has no share in the covariance
        value = tl.where(row[:, None] == column[None, :], 0, value)
    at = row.to(tl.int64)[:, None] * size + column[None, :]
    tl.store(product + at, value, mask=live)
    mirror = column.to(tl.int64)[:, None] * size + row[None, :]
    tl.store(product + mirror, tl.trans(value), mask=tl.trans(live) & (i != j))
    square = tl.sum(tl.sum(value * value, 1), 0)
    tl.store(sums + i * tl.num_programs(1) + j, tl.where(i == j, square, 2 * square))


@triton.jit
def centred_product(
    student, shift, stride, left, right, size, first, last,
    GRAM: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of xc xc^T or xc^T xc, of rows that lose their means before they meet."""
    acc = tl.zeros((left.shape[0], right.shape[0]), ACC)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_a = (left < size)[:, None] & (k < last)[None, :]
        live_b = (k < last)[:, None] & (right < size)[None, :]
        if GRAM:
            a = load_centred(student, shift, stride, left.to(tl.int64)[:, None], k[None, :], live_a, ACC)
            b = load_centred(student, shift, stride, right.to(tl.int64)[None, :], k[:, None], live_b, ACC)
        else:
            row = k.to(tl.int64)
            a = load_centred(student, shift, stride, row[None, :], left[:, None], live_a, ACC)
            b = load_centred(student, shift, stride, row[:, None], right[None, :], live_b, ACC)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def raw_product(
    student, shift, stride, left, right, size, first, last,
    GRAM: tl.constexpr, OPERAND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of rows of 16 bits as they are, whose products float32 holds exactly; the means come off after it."""
    acc = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    along_a = tl.zeros((left.shape[0],), tl.float32)  # <y_a, mean>
    along_b = tl.zeros((right.shape[0],), tl.float32)
    mean_square = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(first, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        live_a = (left < size)[:, None] & (k < last)[None, :]
        live_b = (k < last)[:, None] & (right < size)[None, :]
        if GRAM:
            a = tl.load(student + left.to(tl.int64)[:, None] * stride + k[None, :], mask=live_a, other=0)
            b = tl.load(student + right.to(tl.int64)[None, :] * stride + k[:, None], mask=live_b, other=0)
            mean = mean_of(student, shift, k, k < last, tl.float32)
            along_a += tl.sum(a.to(tl.float32) * mean[None, :], 1)
            along_b += tl.sum(b.to(tl.float32) * mean[:, None], 0)
            mean_square += mean * mean
        else:
            row = k.to(tl.int64)
            a = tl.load(student + row[None, :] * stride + left[:, None], mask=live_a, other=0)
            b = tl.load(student + row[:, None] * stride + right[None, :], mask=live_b, other=0)
        acc = tl.dot(a.to(OPERAND), b.to(OPERAND), acc)
    if GRAM:
        return acc - along_a[:, None] - along_b[None, :] + tl.sum(mean_square, 0)
    else:
        mean_a = mean_of(student, shift, left, left < size, tl.float32)
        mean_b = mean_of(student, shift, right, right < size, tl.float32)
        return acc - mean_a[:, None] * mean_b[None, :] * (last - first).to(tl.float32)


@triton.jit
def vicreg_product_kernel(
    student,  # [N, D], last dimension contiguous
    shift, squares,  # [D]
    product,  # [size, size], or [SPLITS, size, size], of which only the tiles from the diagonal on are written
    sums,  # [tiles, tiles]
    stride, rows, width, size, depth, depth_a_split, spare,
    GRAM: tl.constexpr, SPLIT: tl.constexpr, RAW: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of xc xc^T (GRAM) or xc^T xc, and one split of the columns or rows that it sums over.
    # RAW, for 16 bits: the means come off after the product, unless they are so large that this would cancel.
    i = tl.program_id(0)
    j = tl.program_id(1)
    if i > j:
        if not SPLIT:
            tl.store(sums + i * tl.num_programs(1) + j, tl.cast(0, ACC))
        return
    left = i * TILE + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    first = tl.program_id(2) * depth_a_split
    last = tl.minimum(first + depth_a_split, depth)
    if RAW:
        if means_are_large(student, shift, squares, rows, width, GRAM, 1024):
            acc = centred_product(
                student, shift, stride, left, right, size, first, last, GRAM, PRECISION, BLOCK_K // 2, ACC
            )
        else:
            acc = raw_product(student, shift, stride, left, right, size, first, last, GRAM, OPERAND, BLOCK_K)
    else:
        acc = centred_product(student, shift, stride, left, right, size, first, last, GRAM, PRECISION, BLOCK_K, ACC)
    if SPLIT:
        live = (left < size)[:, None] & (right < size)[None, :]
        at = (tl.program_id(2).to(tl.int64) * size + left.to(tl.int64)[:, None]) * size + right[None, :]
        tl.store(product + at, acc, mask=live)
    else:
        finish_tile(acc, product, sums, i, j, left, right, size, spare, GRAM, ACC)


@triton.jit
def vicreg_reduce_kernel(
    parts,  # [splits, size, size]
    product,  # [size, size]
    sums,  # [tiles, tiles]
    size, splits, spare,
    GRAM: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile, and adds up its splits in their order.
    i = tl.program_id(0)
    j = tl.program_id(1)
    if i > j:
        tl.store(sums + i * tl.num_programs(1) + j, tl.cast(0, ACC))
        return
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    live = (row < size)[:, None] & (column < size)[None, :]
    acc = tl.zeros((TILE, TILE), ACC)
    for split in range(splits):
        at = (tl.cast(split, tl.int64) * size + row.to(tl.int64)[:, None]) * size + column[None, :]
        acc += tl.load(parts + at, mask=live, other=0)
    finish_tile(acc, product, sums, i, j, row, column, size, spare, GRAM, ACC)


@triton.jit
def vicreg_terms_kernel(
    errors,  # [splits * D] or None
    squares,  # [D]
    sums,  # [tiles * tiles] or None
    invariance, variance, covariance,  # []
    rows, width, over, spare, divisor, errors_count, sums_count,
    GAMMA: tl.constexpr, EPS: tl.constexpr, GRAM: tl.constexpr, VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program makes the three terms of what the others summed: in float64, since the difference of the product's
    # squares and the columns' cancels, and few numbers are left.
    lane = tl.arange(0, BLOCK)
    hinge = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    error = tl.zeros((BLOCK,), tl.float64)
    gamma = tl.full((), GAMMA, ACC)
    for start in range(0, width, BLOCK):
        live = start + lane < width
        square = tl.load(squares + start + lane, mask=live, other=0)
        sigma = deviation(square, over, EPS, ACC)
        # sigma >= gamma, and not the maximum of 0: a NaN must stay one.
        hinge += tl.where(live, tl.where(sigma >= gamma, 0, gamma - sigma), 0).to(tl.float64)
        if GRAM:
            column = (square / tl.cast(spare, ACC)).to(tl.float64)
            total -= column * column
    if sums is not None:
        for start in range(0, sums_count, BLOCK):
            total += tl.load(sums + start + lane, mask=start + lane < sums_count, other=0).to(tl.float64)
    if errors is not None:
        for start in range(0, errors_count, BLOCK):
            error += tl.load(errors + start + lane, mask=start + lane < errors_count, other=0).to(tl.float64)
    n = tl.cast(rows, tl.float64)
    tl.store(invariance, (tl.sum(error, 0) / n / width).to(ACC))
    if VARIANCE:
        tl.store(variance, (tl.sum(hinge, 0) / width).to(ACC))
    else:
        tl.store(variance, tl.cast(0, ACC))
    if sums is not None:
        tl.store(covariance, (tl.sum(total, 0) / tl.cast(divisor, tl.float64)).to(ACC))
    else:
        tl.store(covariance, tl.cast(0, ACC))


@triton.jit
def vicreg_bwd_kernel(
    student, teacher,  # [N, D], last dimension contiguous
    shift, squares,  # [D]
    product,  # [N, N] or [D, D]
    grad_invariance, grad_variance, grad_covariance,  # []; None where the term has no share
    grad_student, grad_teacher,  # [N, D] contiguous; None where it is not wanted
    stride_student, stride_teacher, rows, width, over, spare, divisor,
    GAMMA: tl.constexpr, EPS: tl.constexpr, GRAM: tl.constexpr, RAW: tl.constexpr,
    OPERAND: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of the gradients, whose elementwise terms are the epilogue of the product.
    # RAW, for 16 bits: the product meets y as it is, and what the means have brought in comes off after it. ROUND is
    # what the other operand is rounded to; OPERAND differs from it in the interpreter, whose bfloat16 dot is wrong.
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < width
    live = (row < rows)[:, None] & inside[None, :]
    n = tl.cast(rows, ACC)
    grad = tl.zeros((TILE, TILE), ACC)
    coefficient = tl.zeros((TILE,), ACC)
    if grad_covariance is not None:
        outer = 4 * tl.load(grad_covariance).to(ACC) / (tl.cast(divisor, ACC) * tl.cast(spare, ACC))
        if GRAM:
            along = tl.zeros((TILE,), ACC)  # the rows' sums of the product
            for start in range(0, rows, BLOCK_K):
                k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                live_p = (row < rows)[:, None] & (k < rows)[None, :]
                live_y = (k < rows)[:, None] & inside[None, :]
                whole = tl.load(product + row[:, None] * rows + k[None, :], mask=live_p, other=0)
                p = whole.to(ROUND).to(OPERAND)
                if RAW:
                    y = tl.load(student + k[:, None] * stride_student + column[None, :], mask=live_y, other=0)
                    along += tl.sum(p.to(ACC), 1)
                    if tl.bfloat16 == ROUND:
                        # The rest of it in a second product: the columns' own share is taken off below, and cancels.
                        rest = (whole - p.to(ACC)).to(ROUND).to(OPERAND)
                        along += tl.sum(rest.to(ACC), 1)
                        grad = tl.dot(rest, y.to(OPERAND), grad, input_precision=PRECISION, out_dtype=ACC)
                else:
                    y = load_centred(student, shift, stride_student, k[:, None], column[None, :], live_y, ACC)
                grad = tl.dot(p, y.to(OPERAND), grad, input_precision=PRECISION, out_dtype=ACC)
            if RAW:
                grad -= along[:, None] * mean_of(student, shift, column, inside, ACC)[None, :]
        else:
            beside = tl.zeros((TILE,), ACC)  # <mean, the product's columns>
            for start in range(0, width, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                live_y = (row < rows)[:, None] & (k < width)[None, :]
                live_p = (k < width)[:, None] & inside[None, :]
                at = k.to(tl.int64)[:, None] * width + column[None, :]
                p = tl.load(product + at, mask=live_p, other=0).to(ROUND).to(OPERAND)
                if RAW:
                    y = tl.load(student + row[:, None] * stride_student + k[None, :], mask=live_y, other=0)
                    beside += tl.sum(p.to(ACC) * mean_of(student, shift, k, k < width, ACC)[:, None], 0)
                else:
                    y = load_centred(student, shift, stride_student, row[:, None], k[None, :], live_y, ACC)
                grad = tl.dot(y.to(OPERAND), p, grad, input_precision=PRECISION, out_dtype=ACC)
            if RAW:
                grad -= beside[None, :]
        square = tl.load(squares + column, mask=inside, other=1)
        if GRAM:
            coefficient -= outer * square / tl.cast(spare, ACC)
        # A column that is constant has a gradient of 0, to the bit, also where its mean came off after the product.
        grad = tl.where((square == 0)[None, :], 0, grad * outer)
    if grad_variance is not None:
        sigma = deviation(tl.load(squares + column, mask=inside, other=1), over, EPS, ACC)
        pull = tl.load(grad_variance).to(ACC) / (tl.cast(width, ACC) * tl.cast(over, ACC))
        coefficient -= tl.where(sigma < tl.full((), GAMMA, ACC), pull, 0) / sigma
    if grad_variance is not None or grad_covariance is not None:
        grad += coefficient[None, :] * load_centred(
            student, shift, stride_student, row[:, None], column[None, :], live, ACC
        )
    if grad_invariance is not None:
        y = tl.load(student + row[:, None] * stride_student + column[None, :], mask=live, other=0).to(ACC)
        g = tl.load(teacher + row[:, None] * stride_teacher + column[None, :], mask=live, other=0).to(ACC)
        towards = 2 * tl.load(grad_invariance).to(ACC) / (n * tl.cast(width, ACC)) * (y - g)
        grad += towards
        if grad_teacher is not None:
            store(grad_teacher + row[:, None] * width + column[None, :], -towards, live)
    if grad_student is not None:
        store(grad_student + row[:, None] * width + column[None, :], grad, live)
