"""VICReg's terms, and the gradient as one more product. See ops/vicreg.py."""

import triton
import triton.language as tl

from .columns import deviation
from .store import store
from .vicreg_product import add_product, in_product, load_centred, mean_of


@triton.jit
def find_largest(squares, width, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The column that deviates most, the first of several; NaN is never it."""
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -1, ACC)
    at = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, width, BLOCK):
        square = tl.load(squares + start + lane, mask=start + lane < width, other=-1)
        larger = square > most
        most = tl.where(larger, square, most)
        at = tl.where(larger, start + lane, at)
    return tl.min(tl.where(most == tl.max(most, 0), at, width), 0)


@triton.jit
def vicreg_cross_kernel(
    student,  # [N, D], last dimension contiguous
    shift, squares,  # [D]
    largest, cross,  # [], [D]
    stride, rows, width, dof,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK_D columns: their covariances with the largest, which has none with itself here.
    p = find_largest(squares, width, 1024, ACC)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (column < width) & (column != p)
    total = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, rows, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)  # int64: row * stride passes 2**31
        live = (row < rows)[:, None] & inside[None, :]
        x = load_centred(student, shift, stride, row[:, None], column[None, :], live, ACC)
        total += tl.sum(x * load_centred(student, shift, stride, row, p + 0 * row, row < rows, ACC)[:, None], 0)
    tl.store(cross + column, total / tl.cast(dof, ACC), mask=column < width)
    if tl.program_id(0) == 0:
        tl.store(largest, p)


@triton.jit
def weight_of(weights, index: tl.constexpr, number, ACC: tl.constexpr):
    """Returns a term's weight: the number, which is float32, or an element of the tensor of all three."""
    if weights is None:
        weight = tl.cast(number, ACC)
    else:
        weight = tl.load(weights + index).to(ACC)
    return weight


@triton.jit
def vicreg_terms_kernel(
    errors,  # [splits * D] or None
    squares,  # [D]
    largest, cross,  # [], [D] (GRAM), or None
    sums,  # [tiles * tiles] or None
    weights,  # [3] or None
    loss, invariance, variance, covariance,  # []
    rows, width, over, dof, divisor, errors_count, sums_count, inv_weight, var_weight, cov_weight,
    GAMMA: tl.constexpr, EPS: tl.constexpr, VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program makes the loss and its terms of what the others summed: in float64, since the difference of the
    # product's squares and the columns' cancels, and few numbers are left.
    lane = tl.arange(0, BLOCK)
    error = tl.zeros((BLOCK,), tl.float64)
    if errors is not None:
        for start in range(0, errors_count, BLOCK):
            error += tl.load(errors + start + lane, mask=start + lane < errors_count, other=0).to(tl.float64)
    inv = (tl.sum(error, 0) / tl.cast(rows, tl.float64) / width).to(ACC)
    hinge = tl.zeros((BLOCK,), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    gamma = tl.full((), GAMMA, ACC)
    for start in range(0, width, BLOCK):
        live = start + lane < width
        square = tl.load(squares + start + lane, mask=live, other=0)
        sigma = deviation(square, over, EPS, ACC)
        # sigma >= gamma, and not the maximum of 0: a NaN must stay one.
        hinge += tl.where(live, tl.where(sigma >= gamma, 0, gamma - sigma), 0).to(tl.float64)
        if largest is not None:
            own = tl.where(in_product(start + lane, largest), square / tl.cast(dof, ACC), 0).to(tl.float64)
            covariances = tl.load(cross + start + lane, mask=live, other=0).to(tl.float64)
            total += 2 * covariances * covariances - own * own
    if sums is not None:
        for start in range(0, sums_count, BLOCK):
            total += tl.load(sums + start + lane, mask=start + lane < sums_count, other=0)
    var = tl.cast(0, ACC)
    if VARIANCE:
        var = (tl.sum(hinge, 0) / width).to(ACC)
    cov = (tl.sum(total, 0) / tl.cast(divisor, tl.float64)).to(ACC)
    tl.store(invariance, inv)
    tl.store(variance, var)
    tl.store(covariance, cov)
    weighted = weight_of(weights, 0, inv_weight, ACC) * inv + weight_of(weights, 1, var_weight, ACC) * var
    tl.store(loss, weighted + weight_of(weights, 2, cov_weight, ACC) * cov)


@triton.jit
def term_grad(grad_output, weights, index: tl.constexpr, number, ACC: tl.constexpr):
    """The gradient of a term."""
    return tl.load(grad_output).to(ACC) * weight_of(weights, index, number, ACC)


@triton.jit
def as_multiplied(x, ROUND: tl.constexpr, PRECISION: tl.constexpr):
    """Rounds x to what the matrix unit reads: TF32 is float32 whose last 13 bits the unit ignores.

    A sum of x that corrects the product must be a sum of the same numbers.
    """
    x = x.to(ROUND)
    if tl.float32 == ROUND and PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        # A carry out of the mantissa is right, and makes infinity of the largest numbers. NaN must stay NaN.
        x = tl.where(x == x, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def vicreg_bwd_kernel(
    student, target,  # [N, D], last dimension contiguous
    shift, squares,  # [D]
    product,  # [N, N] or [D, D]
    largest, cross,  # [], [D] (GRAM)
    grad_output, weights,  # [], [3] or None
    grad_student, grad_target,  # [N, D] contiguous; None where it is not wanted
    stride_student, stride_target, rows, width, over, dof, divisor, inv_weight, var_weight, cov_weight,
    INVARIANCE: tl.constexpr, VARIANCE: tl.constexpr, COVARIANCE: tl.constexpr,
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
    one = tl.where(rows > 0, 1.0, 0.0)
    grad = tl.zeros((TILE, TILE), ACC)
    coefficient = tl.zeros((TILE,), ACC)
    if COVARIANCE:
        outer = 4 * term_grad(grad_output, weights, 2, cov_weight, ACC) / (tl.cast(divisor, ACC) * tl.cast(dof, ACC))
        if GRAM:
            row_sums = tl.zeros((TILE,), ACC)  # of the product
            for start in range(0, rows, BLOCK_K):
                k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
                live_p = (row < rows)[:, None] & (k < rows)[None, :]
                live_y = (k < rows)[:, None] & inside[None, :]
                whole = tl.load(product + row[:, None] * rows + k[None, :], mask=live_p, other=0)
                p = as_multiplied(whole, ROUND, PRECISION).to(OPERAND)
                rest = None
                if RAW:
                    y = tl.load(student + k[:, None] * stride_student + column[None, :], mask=live_y, other=0)
                    row_sums += tl.sum(p.to(ACC), 1)
                    if tl.bfloat16 == ROUND:
                        # The rest goes into a second product: the columns' own squares are subtracted below.
                        rest = (whole - p.to(ACC)).to(ROUND).to(OPERAND)
                        row_sums += tl.sum(rest.to(ACC), 1)
                else:
                    y = load_centred(student, shift, stride_student, k[:, None], column[None, :], live_y, ACC)
                grad = add_product(grad, p, y.to(OPERAND), one, PRECISION, ACC, rest)
            if RAW:
                grad -= row_sums[:, None] * mean_of(student, shift, column, inside, ACC)[None, :]
        else:
            mean_dots = tl.zeros((TILE,), ACC)  # <mean, column> of the product
            for start in range(0, width, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                live_y = (row < rows)[:, None] & (k < width)[None, :]
                live_p = (k < width)[:, None] & inside[None, :]
                at = k.to(tl.int64)[:, None] * width + column[None, :]
                p = as_multiplied(tl.load(product + at, mask=live_p, other=0), ROUND, PRECISION).to(OPERAND)
                if RAW:
                    y = tl.load(student + row[:, None] * stride_student + k[None, :], mask=live_y, other=0)
                    mean_dots += tl.sum(p.to(ACC) * mean_of(student, shift, k, k < width, ACC)[:, None], 0)
                else:
                    y = load_centred(student, shift, stride_student, row[:, None], k[None, :], live_y, ACC)
                grad = add_product(grad, y.to(OPERAND), p, one, PRECISION, ACC)
            if RAW:
                grad -= mean_dots[None, :]
        square = tl.load(squares + column, mask=inside, other=1)
        if GRAM:
            coefficient -= tl.where(in_product(column, largest), outer * square / tl.cast(dof, ACC), 0)
        # A column that is constant has a gradient of 0, to the bit, also where its mean came off after the product.
        grad = tl.where((square == 0)[None, :], 0, grad * outer)
        if GRAM:
            p = tl.load(largest) + 0 * row
            largest_column = load_centred(student, shift, stride_student, row, p, row < rows, ACC)
            grad += largest_column[:, None] * (outer * tl.load(cross + column, mask=inside, other=0))[None, :]
    if VARIANCE:
        sigma = deviation(tl.load(squares + column, mask=inside, other=1), over, EPS, ACC)
        pull = term_grad(grad_output, weights, 1, var_weight, ACC) / (tl.cast(width, ACC) * tl.cast(over, ACC))
        coefficient -= tl.where(sigma < tl.full((), GAMMA, ACC), pull, 0) / sigma
    if VARIANCE or COVARIANCE:
        grad += coefficient[None, :] * load_centred(
            student, shift, stride_student, row[:, None], column[None, :], live, ACC
        )
    if INVARIANCE:
        y = tl.load(student + row[:, None] * stride_student + column[None, :], mask=live, other=0).to(ACC)
        g = tl.load(target + row[:, None] * stride_target + column[None, :], mask=live, other=0).to(ACC)
        toward_target = 2 * term_grad(grad_output, weights, 0, inv_weight, ACC) / (n * tl.cast(width, ACC)) * (y - g)
        grad += toward_target
        if grad_target is not None:
            store(grad_target + row[:, None] * width + column[None, :], -toward_target, live)
    if grad_student is not None:
        store(grad_student + row[:, None] * width + column[None, :], grad, live)
