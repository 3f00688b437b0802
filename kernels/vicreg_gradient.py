"""VICReg's gradient: one more product, with the elementwise terms as its epilogue. See ops/vicreg.py."""

import triton
import triton.language as tl

from .columns import deviation
from .store import store
from .vicreg import load_centred, weight_of
from .vicreg_finish import add_rows, as_bfloat16
from .vicreg_product import product_of


@triton.jit
def term_grad(grad_output, weights, index: tl.constexpr, number, ACC: tl.constexpr):
    """Returns the gradient of a term."""
    return tl.load(grad_output).to(ACC) * weight_of(weights, index, number, ACC)


@triton.jit
def times(
    product, stride_product, x, stride, i, j, rows, size, width, one,
    GRAM: tl.constexpr, WHOLE: tl.constexpr, OPERAND: tl.constexpr, STORED_P: tl.constexpr, P: tl.constexpr,
    STORED_X: tl.constexpr, X: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes a tile of P x (GRAM) or x P from the first planes of each. WHOLE: every tile of x is full."""
    if GRAM:
        return product_of(
            product, stride_product, i * TILE, rows, x, stride, j * TILE, width, 0, size, one,
            True, True, STORED_P, P, False, WHOLE, STORED_X, X, OPERAND, TILE, BLOCK_K, ACC,
        )  # fmt: skip
    else:
        return product_of(
            x, stride, i * TILE, rows, product, stride_product, j * TILE, width, 0, size, one,
            True, WHOLE, STORED_X, X, False, True, STORED_P, P, OPERAND, TILE, BLOCK_K, ACC,
        )  # fmt: skip


@triton.jit
def halves(x):
    """Splits a tile into its left and right columns."""
    HALF: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, HALF)), (0, 2, 1)))


@triton.jit
def part_of(x, i: tl.constexpr, PARTS: tl.constexpr):
    """Returns the i-th of one, two or four equal parts of the columns."""
    if PARTS == 1:
        return x
    elif PARTS == 2:
        return halves(x)[i]
    else:
        return halves(halves(x)[i // 2])[i % 2]


@triton.jit
def vicreg_bwd_kernel(
    student, target,  # [N, D], last dimension contiguous
    shift, squares, planes, facts, largest,  # [D], [D], [padded N, PLANES * padded D], [7], [3]
    product, dots, cross,  # [padded, planes * padded], [pieces, D] or None, [D]: see vicreg_finish_kernel
    grad_output, weights,  # [], [3] or None
    grad_student, grad_target,  # [N, D] contiguous; None where it is not wanted
    stride_student, stride_target, stride_planes, stride_product, pieces,
    low, rows,  # own rows of the student: the first, or None for the first of all, and how many
    size, width, divisor, inv_weight, var_weight, cov_weight,
    INVARIANCE: tl.constexpr, VARIANCE: tl.constexpr, COVARIANCE: tl.constexpr, UNBIASED: tl.constexpr,
    GAMMA: tl.constexpr, EPS: tl.constexpr, GRAM: tl.constexpr, RAW: tl.constexpr, WHOLE: tl.constexpr,
    PRODUCT_PLANES: tl.constexpr, PLANES: tl.constexpr, OPERAND: tl.constexpr, PLANE: tl.constexpr,
    TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, PLANES_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of the gradients. Programs that read the same columns run together, GROUP tiles wide.
    tiles_m, tiles_n = tl.cdiv(rows, TILE), tl.cdiv(width, TILE)
    t = tl.program_id(0)
    group = t // (GROUP * tiles_m)
    within = tl.minimum(tiles_n - group * GROUP, GROUP)
    j = group * GROUP + t % (GROUP * tiles_m) % within
    i = t % (GROUP * tiles_m) // within
    row = i * TILE + tl.arange(0, TILE)
    column = j * TILE + tl.arange(0, TILE)
    one = tl.where(rows > 0, 1.0, 0.0)
    whole = tl.zeros((TILE, TILE), ACC)
    outer = tl.zeros((), ACC)
    p = tl.load(largest)
    count = tl.load(largest + 1).to(ACC)
    dof = tl.maximum(count - 1, 1)
    if COVARIANCE:
        outer = 4 * term_grad(grad_output, weights, 2, cov_weight, ACC) / (tl.cast(divisor, ACC) * dof)
        if RAW and p < 0:
            if tl.load(largest + 2) > 0:  # the same branch in every program
                whole = times(
                    product, stride_product, student, stride_student, i, j, rows, size, width, one,
                    GRAM, WHOLE, OPERAND, PRODUCT_PLANES, 1, 1, 1, TILE, BLOCK_K, ACC,
                )  # fmt: skip
            else:
                whole = times(
                    product, stride_product, student, stride_student, i, j, rows, size, width, one,
                    GRAM, WHOLE, OPERAND, PRODUCT_PLANES, PRODUCT_PLANES, 1, 1, TILE, BLOCK_K, ACC,
                )  # fmt: skip
            whole /= tl.load(facts + 3).to(tl.float32)
        else:
            whole = times(
                as_bfloat16(product) if RAW else product, stride_product, planes, stride_planes, i, j, rows, size,
                width, one,
                GRAM, True, PLANE, PRODUCT_PLANES, PRODUCT_PLANES, PLANES, PRODUCT_PLANES, TILE, PLANES_K, ACC,
            )  # fmt: skip
    # A part of the columns at a time: what the elementwise terms take of all would not fit the registers.
    far = row.to(tl.int64)  # int64: row * stride passes 2**31
    at = far
    if low is not None:
        at += low
    PARTS: tl.constexpr = TILE // 32
    for part in tl.static_range(PARTS):
        grad = part_of(whole, part, PARTS)
        column = j * TILE + part * 32 + tl.arange(0, 32)
        inside = column < width
        live = (row < rows)[:, None] & inside[None, :]
        coefficient = tl.zeros((column.shape[0],), ACC)
        square = tl.load(squares + column, mask=inside, other=1)
        if COVARIANCE:
            if dots is not None:  # what the means have brought in
                grad -= add_rows(dots, pieces, width, column, inside)[None, :]
            # A column that is constant has a gradient of 0, to the bit, also where its mean came off after the product.
            grad = tl.where((square == 0)[None, :], 0, grad * outer)
            if GRAM:
                coefficient -= tl.where(column != p, outer * square / dof, 0)
                q = tl.maximum(p, 0) + 0 * far
                x_p = load_centred(student, shift, stride_student, at, q, row < rows, ACC)
                grad += x_p[:, None] * (outer * tl.load(cross + column, mask=inside, other=0))[None, :]
        if VARIANCE:
            over = dof if UNBIASED else count
            sigma = deviation(square, over, EPS, ACC)
            pull = term_grad(grad_output, weights, 1, var_weight, ACC) / (tl.cast(width, ACC) * over)
            coefficient -= tl.where(sigma < tl.full((), GAMMA, ACC), pull, 0) / sigma
        if VARIANCE or COVARIANCE:
            x = load_centred(student, shift, stride_student, at[:, None], column[None, :], live, ACC)
            grad += coefficient[None, :] * x
        if INVARIANCE:
            y = tl.load(student + at[:, None] * stride_student + column[None, :], mask=live, other=0).to(ACC)
            g = tl.load(target + far[:, None] * stride_target + column[None, :], mask=live, other=0).to(ACC)
            scale = 2 * term_grad(grad_output, weights, 0, inv_weight, ACC) / (count * tl.cast(width, ACC))
            difference = scale * (y - g)
            grad += difference
            if grad_target is not None:
                store(grad_target + far[:, None] * width + column[None, :], -difference, live)
        if grad_student is not None:
            store(grad_student + far[:, None] * width + column[None, :], grad, live)
