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
    if tl.float64 == OPERAND:  # with TF32, the default, Triton 3.6 does not compile it for AMD
        return tl.dot(a0, b0, acc, input_precision="ieee")
    else:
        return tl.dot(a0, b0, acc)


@triton.jit
def start_of(first, side, lane, stride, ROWS: tl.constexpr, PLANES: tl.constexpr):
    """Returns where a tile of an operand begins: some rows and the first columns (ROWS), or some columns."""
    if ROWS:
        return (first + side).to(tl.int64) * stride
    else:
        return lane.to(tl.int64) * stride + (place_of(first, side.shape[0] * side.shape[1], PLANES) + side)


@triton.jit
def step_to(start, lane, stride, ROWS: tl.constexpr, PLANES: tl.constexpr):
    """Returns how far a step of the sum lies from where the tile begins."""
    if ROWS:
        return place_of(start, lane.shape[0] * lane.shape[1], PLANES) + lane
    else:
        return tl.cast(start, tl.uint32).to(tl.int64) * stride  # unsigned: a sign takes more instructions


@triton.jit
def product_of(
    a, stride_a, first_a, size_a, b, stride_b, first_b, size_b, low, high, one,
    ROWS_A: tl.constexpr, WHOLE_A: tl.constexpr, STORED_A: tl.constexpr, A: tl.constexpr,
    ROWS_B: tl.constexpr, WHOLE_B: tl.constexpr, STORED_B: tl.constexpr, B: tl.constexpr,
    OPERAND: tl.constexpr, TILE: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Computes a tile of the product of two operands, from `low` to `high` of what it sums over.

    An operand is the first A or B of its STORED planes. The tile takes its rows (ROWS) or its columns, from the first
    on, of `size` in all. WHOLE: no tile of it has an end in it.
    """
    acc = tl.zeros((TILE, TILE), ACC)
    side = tl.arange(0, TILE)
    lane = tl.arange(0, BLOCK_K)
    start_a = a + start_of(first_a, side[:, None], lane[None, :], stride_a, ROWS_A, STORED_A)
    start_b = b + start_of(first_b, side[None, :], lane[:, None], stride_b, ROWS_B, STORED_B)
    for start in range(low, high, BLOCK_K):
        live_a = None
        live_b = None
        if not WHOLE_A:
            live_a = (first_a + side < size_a)[:, None] & (lane < high - start)[None, :]
        if not WHOLE_B:
            live_b = (lane < high - start)[:, None] & (first_b + side < size_b)[None, :]
        at_a = start_a + step_to(start, lane[None, :], stride_a, ROWS_A, STORED_A)
        at_b = start_b + step_to(start, lane[:, None], stride_b, ROWS_B, STORED_B)
        # Without the factor, 1 at run time, the compiler would add within the matrix unit after all.
        acc += multiply(at_a, live_a, at_b, live_b, OPERAND, A, B) * one
    return acc


@triton.jit
def vicreg_product_kernel(
    student, largest,  # [N, D], last dimension contiguous; [3]: see vicreg_statistics_kernel
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
    low_row = i * TILE
    if PART:
        low_row += low
    left = low_row + tl.arange(0, TILE)
    right = j * TILE + tl.arange(0, TILE)
    first = split * depth_a_split
    last = tl.minimum(first + depth_a_split, depth)
    one = tl.where(depth > 0, 1.0, 0.0)
    live = (row < own)[:, None] & (right < size)[None, :]
    if RAW and tl.load(largest) < 0:
        acc = product_of(
            student, stride, low_row, size, student, stride, j * TILE, size, first, last, one,
            GRAM, WHOLE, 1, 1, GRAM, WHOLE, 1, 1, OPERAND, TILE, BLOCK_K, ACC,
        )  # fmt: skip
        if GRAM:
            if not PART:
                at = (split * tiles + j) * size + left
                tl.store(row_sums + at, tl.sum(tl.where(live, acc, 0), 1), mask=left < size)
            if (i != j) | PART:
                at = (split * tl.cdiv(own, TILE) + i) * size + right
                tl.store(row_sums + at, tl.sum(tl.where(live, acc, 0), 0), mask=right < size)
    else:
        acc = product_of(
            planes, stride_planes, low_row, size, planes, stride_planes, j * TILE, size, first, last, one,
            GRAM, True, PLANES, PLANES, GRAM, True, PLANES, PLANES, PLANE, TILE, PLANES_K, ACC,
        )  # fmt: skip
    at = (split.to(tl.int64) * own + row.to(tl.int64)[:, None]) * size + right[None, :]
    tl.store(parts + at, acc, mask=live)
