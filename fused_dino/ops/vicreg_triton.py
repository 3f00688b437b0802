"""VICReg's launchers and dispatcher ops. The product is allocated once: [N, N] by rows, [D, D] by columns.

Where its tiles fill less than half of a GPU it is computed in splits, which are more matrices of that size until
they are added up: together they hold at most as many numbers as the student, but in the accumulation's dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .columns import COLUMNS, ROWS, launch_statistics
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch
from .vicreg_plan import Plan

PROGRAMS = 256  # that fill a GPU
HALF = (torch.bfloat16, torch.float16)
# (tile, depth of a step, warps) of the two products, by the accumulation and the student's dtype.
TILES = {"float64": (32, 16, 2), "float32": (64, 32, 4), "half": (64, 64, 4)}


def kind(student: Tensor, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "float64"
    return "half" if student.dtype in HALF else "float32"


def precision() -> str:
    """Return the precision of float32 products: TF32 in three passes, or in one if torch's setting allows it.

    AMD multiplies float32. fp32_precision follows every way of setting it; reading allow_tf32 raises once that was set.
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


class Saved(NamedTuple):
    """What the backward needs of the forward."""

    shift: Tensor  # [D]; the mean of a column is its first element plus this
    squares: Tensor  # [D], of the centred columns
    product: Tensor  # [N, N] or [D, D]; [0, 0] without a covariance
    largest: Tensor  # [], the column that deviates most, where the product is that of rows
    cross: Tensor  # [D], its covariances; [0] where the product is not that of rows


class Forward(NamedTuple):
    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    shift: Tensor
    squares: Tensor
    product: Tensor
    largest: Tensor
    cross: Tensor


def vicreg_fwd_empty(student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> Forward:
    """The loss and its three terms [], then what the backward needs."""
    (n, d), dtype = student.shape, acc_dtype(student, target)
    size = (n if plan.gram else d) if plan.covariance else 0
    loss, invariance, variance, covariance = (student.new_empty((), dtype=dtype) for _ in range(4))
    shift, squares = (student.new_empty(d, dtype=dtype) for _ in range(2))
    product = student.new_empty((size, size), dtype=dtype)
    by_rows = plan.covariance and plan.gram
    largest = student.new_empty((), dtype=torch.int32)
    cross = student.new_empty(d if by_rows else 0, dtype=dtype)
    return Forward(loss, invariance, variance, covariance, shift, squares, product, largest, cross)


def launch_vicreg_fwd(out: Forward, student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> None:
    from ..kernels import vicreg as kernels

    student, target = rows_of(student, target)
    loss, invariance, variance, covariance, shift, squares, product, largest, cross = out
    n, d = student.shape
    if not n:
        both = plan.invariance or plan.variance
        for term, computed in ((loss, both), (invariance, plan.invariance), (variance, plan.variance)):
            term.fill_(float("nan") if computed else 0)
        for x in out[3:]:
            x.zero_()
        return
    dtype = shift.dtype
    acc, dof = acc_of(dtype), max(n - 1, 1)
    with torch.cuda.device_of(student):
        errors = launch_statistics(student, target if plan.invariance else None, None, shift, squares)
        sums, by_rows = None, plan.covariance and plan.gram
        if by_rows:
            launch(kernels.vicreg_cross_kernel, (cdiv(d, COLUMNS),),
                student, shift, squares, largest, cross, student.stride(0), n, d, dof,
                BLOCK_N=ROWS, BLOCK_D=COLUMNS, ACC=acc, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            largest.zero_()
        of_largest = (largest, cross) if by_rows else (None, None)
        if plan.covariance:
            sums = launch_product(student, shift, squares, of_largest[0], product, plan)
        launch(kernels.vicreg_terms_kernel, (1,),
            errors, squares, *of_largest, sums, weights, loss, invariance, variance, covariance,
            n, d, dof if plan.unbiased else n, dof, plan.divisor,
            0 if errors is None else errors.numel(), 0 if sums is None else sums.numel(), *plan.weights,
            GAMMA=plan.gamma, EPS=plan.eps, VARIANCE=plan.variance,
            BLOCK=1024, ACC=acc, num_warps=16, enable_fp_fusion=True,
        )  # fmt: skip


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
    tiles, dof = cdiv(size, tile), max(n - 1, 1)
    splits, depth_a_split = split(size, depth, tiles, step)
    sums = student.new_empty((tiles, tiles), dtype=torch.float64)
    parts = product if splits == 1 else student.new_empty((splits, size, size), dtype=shift.dtype)
    launch(kernels.vicreg_product_kernel, (tiles, tiles, splits),
        student, shift, squares, largest, parts, sums, student.stride(0), n, d, size, depth, depth_a_split, dof,
        GRAM=plan.gram, SPLIT=splits > 1, **options,
    )  # fmt: skip
    if splits > 1:
        launch(kernels.vicreg_reduce_kernel, (tiles, tiles),
            parts, product, sums, size, splits, dof,
            GRAM=plan.gram, TILE=tile, ACC=options["ACC"], num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return sums


class BackwardOptions(NamedTuple):
    """The plan, and whose gradients are made."""

    for_student: bool
    for_target: bool
    plan: Plan


def vicreg_bwd_empty(
    student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved, options: BackwardOptions
) -> tuple[Tensor, Tensor]:
    """The gradients of student and target, each [N, D] and contiguous, or empty where not wanted."""
    for_s = student.new_empty(student.shape if options.for_student else 0)
    for_t = target.new_empty(target.shape if options.for_target else 0)
    return for_s, for_t


def launch_vicreg_bwd(
    grads: tuple[Tensor, Tensor], student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None,
    saved: Saved, options: BackwardOptions,
) -> None:  # fmt: skip
    """A product of the student with a rounded matrix: bfloat16 in its own instructions, float16 in TF32, which holds it
    exactly and has the range that the product needs."""
    import triton.language as tl

    from ..kernels import vicreg as kernels

    for_student, for_target, plan = options
    student, target = rows_of(student, target)
    n, d = student.shape
    if for_target and not plan.invariance:
        grads[1].zero_()
    if not n:
        return
    constants = tile_options(student, saved.shift.dtype)
    if constants["RAW"]:  # the matrix is float32
        constants["BLOCK_K"] //= 2
    if constants["RAW"] and student.dtype == torch.float16:
        constants |= {"OPERAND": tl.float32, "PRECISION": "ieee" if torch.version.hip else "tf32"}
    if for_target:
        constants["num_warps"] = 8  # a second gradient would fill the registers
    rounded = tl.bfloat16 if constants["RAW"] and student.dtype == torch.bfloat16 else constants["OPERAND"]
    dof = max(n - 1, 1)
    tile = constants["TILE"]
    with torch.cuda.device_of(student):
        launch(kernels.vicreg_bwd_kernel, (cdiv(n, tile), cdiv(d, tile)),
            student, target, *saved, grad_output, weights,
            grads[0] if for_student else None, grads[1] if for_target else None,
            student.stride(0), target.stride(0), n, d, dof if plan.unbiased else n, dof, plan.divisor,
            *plan.weights,
            INVARIANCE=plan.invariance, VARIANCE=plan.variance, COVARIANCE=plan.covariance and for_student,
            GAMMA=plan.gamma, EPS=plan.eps, GRAM=plan.gram, ROUND=rounded, **constants,
        )  # fmt: skip


vicreg_fwd = launched("vicreg_fwd", vicreg_fwd_empty, launch_vicreg_fwd)
vicreg_bwd = launched("vicreg_bwd", vicreg_bwd_empty, launch_vicreg_bwd)
