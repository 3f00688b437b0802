"""VICReg's launchers and dispatcher ops. The product is allocated once: [N, N] by rows, [D, D] by columns.

Where its tiles fill less than half of a GPU it is computed in splits, which are matrices of that size beside it until
they are added up: together they hold at most as many numbers as the student, but in the accumulation's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.dtypes import wide
from .columns import COLUMNS, ROWS, launch_statistics
from .dispatch import acc_of, cdiv, define, rows_of
from .vicreg_plan import PLAN, Plan

PROGRAMS = 256  # that fill a GPU
HALF = (torch.bfloat16, torch.float16)
# (tile, depth of a step, warps) of the two products, by the accumulation and the student's dtype.
TILES = {"float64": (32, 16, 2), "float32": (64, 32, 4), "half": (64, 64, 4)}


def kind(student: Tensor, dtype: torch.dtype) -> str:
    return "half" if dtype == torch.float32 and student.dtype in HALF else str(dtype).removeprefix("torch.")


def precision() -> str:
    """Of float32 products: three passes of TF32, or one where torch's own setting allows it; AMD multiplies float32.

    fp32_precision is read, which follows every way of setting it; allow_tf32 raises once fp32_precision was set.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def tile_options(student: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """enable_fp_fusion explicitly: it rounds once less, and Triton 3.10 changes the default."""
    import triton
    import triton.language as tl

    tile, depth, warps = TILES[kind(student, dtype)]
    if student.stride(0) * student.element_size() % 16 or student.data_ptr() % 16:
        depth, warps = max(16, depth // 2), 8  # rows are loaded element by element: their addresses fill the registers
    raw = kind(student, dtype) == "half"
    operand = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[student.dtype] if raw else acc_of(dtype)
    return {
        "RAW": raw,
        "OPERAND": tl.float32 if raw and triton.knobs.runtime.interpret else operand,
        "PRECISION": precision() if dtype == torch.float32 else "ieee",
        "TILE": tile,
        "BLOCK_K": depth,
        "ACC": acc_of(dtype),
        "num_warps": warps,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def vicreg_fwd_fake(student: Tensor, teacher: Tensor, weights: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    """What the forward returns, not filled: the loss and its three terms [], shift [D], squares [D], product [N, N] or
    [D, D], and by rows largest [], cross [D].

    The product is [0, 0] and cross [0] where no covariance is wanted.
    """
    plan = Plan(*options)
    (n, d), dtype = student.shape, wide(student, teacher)
    size = (n if plan.gram else d) if plan.covariance else 0
    loss, invariance, variance, covariance = (student.new_empty((), dtype=dtype) for _ in range(4))
    shift, squares = (student.new_empty(d, dtype=dtype) for _ in range(2))
    product = student.new_empty((size, size), dtype=dtype)
    by_rows = plan.covariance and plan.gram
    largest = student.new_empty((), dtype=torch.int32)
    cross = student.new_empty(d if by_rows else 0, dtype=dtype)
    return loss, invariance, variance, covariance, shift, squares, product, largest, cross


def vicreg_fwd_triton(student: Tensor, teacher: Tensor, weights: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    from ..kernels import vicreg as kernels

    plan = Plan(*options)
    student, teacher = rows_of(student, teacher)
    out = vicreg_fwd_fake(student, teacher, weights, *options)
    loss, invariance, variance, covariance, shift, squares, product, largest, cross = out
    n, d = student.shape
    if not n:
        both = plan.invariance or plan.variance
        for term, computed in ((loss, both), (invariance, plan.invariance), (variance, plan.variance)):
            term.fill_(float("nan") if computed else 0)
        for kept in out[3:]:
            kept.zero_()
        return out
    dtype = shift.dtype
    acc, spare = acc_of(dtype), max(n - 1, 1)
    with torch.cuda.device_of(student):
        errors = launch_statistics(student, teacher if plan.invariance else None, None, shift, squares)
        sums, by_rows = None, plan.covariance and plan.gram
        if by_rows:
            kernels.vicreg_cross_kernel[(cdiv(d, COLUMNS),)](
                student, shift, squares, largest, cross, student.stride(0), n, d, spare,
                BLOCK_N=ROWS, BLOCK_D=COLUMNS, ACC=acc, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            largest.zero_()
        apart = (largest, cross) if by_rows else (None, None)
        if plan.covariance:
            sums = launch_product(student, shift, squares, apart[0], product, plan)
        kernels.vicreg_terms_kernel[(1,)](
            errors, squares, *apart, sums, weights, loss, invariance, variance, covariance,
            n, d, spare if plan.unbiased else n, spare, plan.divisor,
            0 if errors is None else errors.numel(), 0 if sums is None else sums.numel(), *plan.weights,
            GAMMA=plan.gamma, EPS=plan.eps, VARIANCE=plan.variance,
            BLOCK=1024, ACC=acc, num_warps=16, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def split(size: int, depth: int, tiles: int, step: int) -> tuple[int, int]:
    """(splits, the depth of each but the last) of a product [size, size]."""
    splits = max(1, min(PROGRAMS // (tiles * (tiles + 1) // 2), depth // size, depth // (4 * step)))
    depth_a_split = cdiv(cdiv(depth, splits), step) * step
    return cdiv(depth, depth_a_split), depth_a_split


def launch_product(
    student: Tensor, shift: Tensor, squares: Tensor, largest: Tensor | None, product: Tensor, plan: Plan
) -> Tensor:
    """Fills the product -> the sums of its tiles' squares."""
    from ..kernels import vicreg_product as kernels

    n, d = student.shape
    size, depth = (n, d) if plan.gram else (d, n)
    options = tile_options(student, shift.dtype)
    tile, step = options["TILE"], options["BLOCK_K"]
    tiles, spare = cdiv(size, tile), max(n - 1, 1)
    splits, depth_a_split = split(size, depth, tiles, step)
    sums = student.new_empty((tiles, tiles), dtype=torch.float64)
    parts = product if splits == 1 else student.new_empty((splits, size, size), dtype=shift.dtype)
    kernels.vicreg_product_kernel[(tiles, tiles, splits)](
        student, shift, squares, largest, parts, sums, student.stride(0), n, d, size, depth, depth_a_split, spare,
        GRAM=plan.gram, SPLIT=splits > 1, **options,
    )  # fmt: skip
    if splits > 1:
        kernels.vicreg_reduce_kernel[(tiles, tiles)](
            parts, product, sums, size, splits, spare,
            GRAM=plan.gram, TILE=tile, ACC=options["ACC"], num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return sums


def vicreg_bwd_fake(
    student: Tensor, teacher: Tensor, shift: Tensor, squares: Tensor, product: Tensor, largest: Tensor, cross: Tensor,
    grad_output: Tensor, weights: Tensor | None, for_student: bool, for_teacher: bool, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the backward returns, not filled: the gradients, each [N, D] and contiguous, or empty where not wanted."""
    for_s = student.new_empty(student.shape if for_student else 0)
    for_t = teacher.new_empty(teacher.shape if for_teacher else 0)
    return for_s, for_t


def vicreg_bwd_triton(
    student: Tensor, teacher: Tensor, shift: Tensor, squares: Tensor, product: Tensor, largest: Tensor, cross: Tensor,
    grad_output: Tensor, weights: Tensor | None, for_student: bool, for_teacher: bool, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A product of the student with a rounded matrix: bfloat16 in its own instructions, float16 in TF32, which holds it
    exactly and has the range that the product needs."""
    import triton.language as tl

    from ..kernels import vicreg as kernels

    plan = Plan(*options)
    student, teacher = rows_of(student, teacher)
    grads = vicreg_bwd_fake(
        student, teacher, shift, squares, product, largest, cross, grad_output, weights, for_student, for_teacher,
        *options,
    )  # fmt: skip
    n, d = student.shape
    if for_teacher and not plan.invariance:
        grads[1].zero_()
    if not n:
        return grads
    launch = tile_options(student, shift.dtype)
    if launch["RAW"]:  # the matrix is float32
        launch["BLOCK_K"] //= 2
    if launch["RAW"] and student.dtype == torch.float16:
        launch |= {"OPERAND": tl.float32, "PRECISION": "ieee" if torch.version.hip else "tf32"}
    if for_teacher:
        launch["num_warps"] = 8  # a second gradient would fill the registers
    rounded = tl.bfloat16 if launch["RAW"] and student.dtype == torch.bfloat16 else launch["OPERAND"]
    spare = max(n - 1, 1)
    tile = launch["TILE"]
    with torch.cuda.device_of(student):
        kernels.vicreg_bwd_kernel[(cdiv(n, tile), cdiv(d, tile))](
            student, teacher, shift, squares, product, largest, cross, grad_output, weights,
            grads[0] if for_student else None, grads[1] if for_teacher else None,
            student.stride(0), teacher.stride(0), n, d, spare if plan.unbiased else n, spare, plan.divisor,
            *plan.weights,
            INVARIANCE=plan.invariance, VARIANCE=plan.variance, COVARIANCE=plan.covariance and for_student,
            GAMMA=plan.gamma, EPS=plan.eps, GRAM=plan.gram, ROUND=rounded, **launch,
        )  # fmt: skip
    return grads


vicreg_fwd = define(
    f"vicreg_fwd(Tensor student, Tensor teacher, Tensor? weights, {PLAN}) -> (Tensor loss, Tensor invariance, "
    "Tensor variance, Tensor covariance, Tensor shift, Tensor squares, Tensor product, Tensor largest, Tensor cross)",
    vicreg_fwd_triton,
    vicreg_fwd_fake,
)
vicreg_bwd = define(
    "vicreg_bwd(Tensor student, Tensor teacher, Tensor shift, Tensor squares, Tensor product, Tensor largest, "
    "Tensor cross, Tensor grad_output, Tensor? weights, bool for_student, bool for_teacher, "
    f"{PLAN}) -> (Tensor, Tensor)",
    vicreg_bwd_triton,
    vicreg_bwd_fake,
)
