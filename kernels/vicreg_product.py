"""VICReg's symmetric product: of rows or of columns, by tiles from the diagonal on. See ops/vicreg.py."""

import triton
import triton.language as tl

from .vicreg import BLOCK, place_of


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
    TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes a tile of x x^T (GRAM) or x^T x from `first` to `last` of its depth. WHOLE: no tile has an end in it.

    low: the first row on the left, or None for the first of all.
    """
    acc = tl.zeros((TILE, TILE), ACC)
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
def vicreg_product_kernel(
    student, largest,  # [N, D], last dimension contiguous; [2]: see vicreg_statistics_kernel
    planes,  # [padded N, PLANES * padded D]: see vicreg_planes_kernel
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
    if RAW:
        if tl.load(largest) < 0:
            acc = product_of_planes(
                student, stride, i, j, low, size, first, last, one, GRAM, WHOLE, OPERAND, 1, TILE, BLOCK_K, ACC
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
                planes, stride_planes, i, j, low, size, first, last, one, GRAM, True, PLANE, PLANES, TILE, PLANES_K, ACC
            )
    else:
        acc = product_of_planes(
            planes, stride_planes, i, j, low, size, first, last, one, GRAM, True, PLANE, PLANES, TILE, PLANES_K, ACC
        )
    at = (split.to(tl.int64) * own + row.to(tl.int64)[:, None]) * size + right[None, :]
    tl.store(parts + at, acc, mask=live)
