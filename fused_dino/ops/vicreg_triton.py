"""VICReg's launchers and dispatcher ops: four launches forward, one backward.

float32 students are multiplied as planes: sums of bfloat16 numbers, three for float32's accuracy or two where torch
allows TF32. Students of 16 bits are multiplied as they are, or as planes where their means are large or a column
dominates; float64 in its own instructions. The product, [N, N] or [D, D], waits for the backward as planes, and so do
the student's. Splits of a product together hold no more numbers than the student.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .columns import COLUMNS, ROWS, runs_of
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch
from .tickets import ticket
from .vicreg_plan import Plan

PROGRAMS = 132  # that an H100 runs at once, one a multiprocessor
HALF = (torch.bfloat16, torch.float16)
TILES = (128, 64)
# The largest side of a tile, and the bytes of shared memory for steps, by the major version of a GPU. Elsewhere than on
# Hopper larger tiles would not leave enough registers.
HOPPER, ELSEWHERE = (128, 227 * 1024), (64, 64 * 1024)
LIMITS = {9: HOPPER, 10: (64, 99 * 1024)}
FLOAT64 = {"TILE": 32, "BLOCK_K": 16, "PLANES_K": 16, "num_warps": 2}
PIECE = 32  # rows and columns of the product that one program finishes
PAD = 128  # rows and columns to which planes are padded, so that no tile of them has an end in it
GROUP = 8  # tiles of the gradient that run together


@cache
def limits_of(device: torch.device) -> tuple[int, int]:
    """Returns the largest side of a tile, and the bytes of shared memory for the steps of a product."""
    if device.type != "cuda":
        return HOPPER
    major = 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
    return LIMITS.get(major, ELSEWHERE)


def planes_of_products() -> int:
    """Planes of float32 products: three, or two where torch's own setting allows TF32, which has fewer digits.

    AMD multiplies float32. fp32_precision follows every way of setting it; reading allow_tf32 raises once that was set.
    """
    return 2 if torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip else 3


def is_raw(student: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows can be multiplied as they are: 16 bits, in whole vectors."""
    aligned = not (student.stride(0) % 8 or student.shape[1] % 16 or student.data_ptr() % 16)
    return student.dtype in HALF and dtype == torch.float32 and aligned and student.stride(1) == 1


def padded(size: int, dtype: torch.dtype) -> int:
    return size if dtype == torch.float64 else cdiv(size, PAD) * PAD


def planes_in(x: Tensor, width: int) -> int:
    """Counts the planes of a [N, width] that lie in x: none where it is empty, and of float64 itself one."""
    return x.numel() and x.shape[1] // padded(width, x.dtype)


def depth_of(tile: int, tiles: int, memory: int) -> int:
    """How deep a step is: two steps of so many tiles of 16 bits must fit."""
    return next((depth for depth in (128, 64, 32) if 4 * tiles * tile * depth <= memory), 16)


def is_whole(student: Tensor, steps: dict[str, Any]) -> bool:
    """Whether no tile of the student has an end in it."""
    return not any(size % part for size in student.shape for part in (steps["TILE"], steps["BLOCK_K"]))


class Saved(NamedTuple):
    """Tensors that the backward needs of the forward; empty where they are not computed."""

    shift: Tensor  # [D]; the mean of a column is its first element plus this
    squares: Tensor  # [D], of the centred columns
    facts: Tensor  # [4] float64, of all columns
    largest: Tensor  # [], the column that is left out of planes; -1 where the student is multiplied as it is
    planes: Tensor  # [padded N, planes * padded D] bfloat16, of the centred student; unwritten where it is not used
    product: Tensor  # [padded N, planes * padded N] or [padded D, planes * padded D]
    dots: Tensor  # [pieces, N] or [pieces, D]: parts of the product with one vector
    cross: Tensor  # [D], covariances of the largest column, where the product is that of rows


class Forward(NamedTuple):
    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    shift: Tensor
    squares: Tensor
    facts: Tensor
    largest: Tensor
    planes: Tensor
    product: Tensor
    dots: Tensor
    cross: Tensor


def vicreg_fwd_empty(student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> Forward:
    """Allocates the loss and its three terms [], then what the backward needs."""
    (n, d), dtype, half = student.shape, acc_dtype(student, target), student.dtype in HALF
    loss, invariance, variance, covariance = (student.new_empty((), dtype=dtype) for _ in range(4))
    shift, squares = (student.new_empty(d, dtype=dtype) for _ in range(2))
    facts, largest = student.new_empty(4, dtype=torch.float64), student.new_empty((), dtype=torch.int32)
    shapes: dict[str, Any] = {"planes": 0, "product": 0, "dots": 0, "cross": 0}
    of_product = dtype if dtype == torch.float64 else student.dtype if half else torch.bfloat16
    if plan.covariance:
        size, count = padded(n if plan.gram else d, dtype), 1
        if dtype == torch.float32:
            count = planes_of_products()
            shapes["planes"] = (padded(n, dtype), count * padded(d, dtype))
        if half and dtype == torch.float32:
            count = 2
        shapes["product"] = (size, count * size)
        if plan.gram or half:
            shapes["dots"] = (cdiv(size, PIECE), n if plan.gram else d)
        if plan.gram:
            shapes["cross"] = d
    dtypes = {"planes": torch.bfloat16, "product": of_product}
    planes, product, dots, cross = (student.new_empty(x, dtype=dtypes.get(name, dtype)) for name, x in shapes.items())
    return Forward(loss, invariance, variance, covariance, shift, squares, facts, largest, planes, product, dots, cross)


@cache
def operands(student: torch.dtype, dtype: torch.dtype, raw: bool) -> dict[str, Any]:
    """enable_fp_fusion explicitly: it rounds once less, and Triton 3.10 changes the default. The interpreter has no
    product of 16 bits."""
    import triton
    import triton.language as tl

    own = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(student, tl.bfloat16)
    interpret = triton.knobs.runtime.interpret
    return {
        "RAW": raw,
        "OPERAND": tl.float32 if interpret else own,
        "PLANE": tl.float32 if interpret else tl.bfloat16,
        "ACC": acc_of(dtype),
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def launch_vicreg_fwd(out: Forward, student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> None:
    from ..kernels.vicreg import vicreg_planes_kernel, vicreg_statistics_kernel

    student, target = rows_of(student, target)
    terms, saved = out[:4], Saved(*out[4:])
    (n, d), dtype, dof = student.shape, saved.shift.dtype, max(student.shape[0] - 1, 1)
    if not n:
        computed = (plan.invariance or plan.variance, plan.invariance, plan.variance)
        for term, nothing in zip(terms, computed, strict=False):
            term.fill_(float("nan") if nothing else 0)
        for x in out[3:]:
            x.zero_()
        return
    raw = is_raw(student, dtype)
    runs, blocks = runs_of(n, d), cdiv(d, COLUMNS)
    parts = [student.new_empty((runs.number, d), dtype=t) for t in (torch.float64, dtype)]
    errors = student.new_empty(runs.number * blocks, dtype=torch.float64) if plan.invariance else None
    options = {"BLOCK_N": ROWS, "BLOCK_D": COLUMNS, "ACC": acc_of(dtype), "num_warps": 8, "enable_fp_fusion": True}
    last = (None,) * 5 if plan.covariance else (weights, *terms)
    with torch.cuda.device_of(student):
        launch(vicreg_statistics_kernel, (blocks, runs.number),
            student, target if plan.invariance else None, *parts, errors, ticket(student),
            saved.shift, saved.squares, saved.facts, saved.largest, *last, student.stride(0), target.stride(0),
            n, d, runs.length, runs.number, dof if plan.unbiased else n, *plan.weights,
            GAMMA=plan.gamma, EPS=plan.eps, VARIANCE=plan.variance, GRAM=plan.gram, RAW=raw,
            RUNS=runs.most, **options,
        )  # fmt: skip
        if not plan.covariance:
            return
        planes, count = saved.planes if saved.planes.numel() else None, planes_in(saved.planes, d)
        crosses = student.new_empty((runs.number, d), dtype=dtype) if plan.gram else None
        if plan.gram or planes is not None:
            launch(vicreg_planes_kernel, (cdiv(padded(d, dtype), COLUMNS), runs.number),
                student, saved.shift, saved.largest, planes, crosses, student.stride(0), saved.planes.stride(0), n, d,
                padded(n, dtype), runs.length, dof, GRAM=plan.gram, PLANES=count, **options,
            )  # fmt: skip
        launch_product(terms, saved, student, weights, plan, planes, crosses, raw)


def split(size: int, depth: int, tiles: int, step: int) -> tuple[int, int]:
    """Chooses the splits of a product [size, size], and the depth of each but the last."""
    splits = max(1, min(PROGRAMS // (tiles * (tiles + 1) // 2), depth // size, depth // (2 * step)))
    depth_a_split = cdiv(cdiv(depth, splits), step) * step
    return cdiv(depth, depth_a_split), depth_a_split


@cache
def steps_of(limits: tuple[int, int], many: bool, raw: int, planes: int) -> dict[str, Any]:
    """Chooses the side of tiles, the larger where there are many of them, and how deep a step is.

    A step has so many tiles of rows as they are, or so many of planes.
    """
    largest, memory = limits
    tile = min(TILES[0] if many else TILES[1], largest)
    depths = {"BLOCK_K": depth_of(tile, raw, memory), "PLANES_K": depth_of(tile, planes, memory)}
    return {"TILE": tile, **depths, "num_warps": tile // 16}


def launch_product(
    terms: tuple[Tensor, ...], saved: Saved, student: Tensor, weights: Tensor | None, plan: Plan,
    planes: Tensor | None, crosses: Tensor | None, raw: bool,
) -> None:  # fmt: skip
    from ..kernels.vicreg_product import vicreg_finish_kernel, vicreg_product_kernel

    (n, d), dtype, dof = student.shape, saved.shift.dtype, max(student.shape[0] - 1, 1)
    size = n if plan.gram else d
    depth = d if plan.gram else n
    options, count = operands(student.dtype, dtype, raw), planes_in(saved.planes, d)
    steps: dict[str, Any] = FLOAT64
    if planes is not None:
        large = cdiv(size, TILES[0])
        many = large * (large + 1) // 2 >= PROGRAMS // 8
        steps = steps_of(limits_of(student.device), many, 2 if raw else 2 * count, 2 * count)
    tiles, step = cdiv(size, steps["TILE"]), max(steps["BLOCK_K"], steps["PLANES_K"])
    splits, depth_a_split = split(size, depth, tiles, step)
    parts = student.new_empty((splits, size, size), dtype=dtype)
    row_sums = student.new_empty((splits, tiles, size), dtype=dtype) if raw and plan.gram else None
    launch(vicreg_product_kernel, (tiles * (tiles + 1) // 2, splits),
        student, saved.shift, saved.largest, planes, parts, row_sums, student.stride(0), saved.planes.stride(0),
        size, depth, depth_a_split, tiles,
        GRAM=plan.gram, WHOLE=is_whole(student, steps), PLANES=count, **steps, **options,
    )  # fmt: skip
    pieces = cdiv(padded(size, dtype), PIECE)
    programs = pieces * (pieces + 1) // 2
    launch(vicreg_finish_kernel, (programs,),
        parts, row_sums, student, saved.shift, saved.squares, saved.facts, saved.largest, crosses,
        saved.product, saved.dots if saved.dots.numel() else None, saved.cross,
        student.new_empty(programs, dtype=torch.float64), ticket(student), weights, *terms,
        student.stride(0), saved.product.stride(0), pieces, n, d, size, splits, tiles,
        0 if crosses is None else len(crosses), dof, plan.divisor, *plan.weights,
        GRAM=plan.gram, RAW=raw, PLANES=planes_in(saved.product, size), PIECE=PIECE, ACC=options["ACC"],
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


class BackwardOptions(NamedTuple):
    """The plan, and which gradients are computed."""

    for_student: bool
    for_target: bool
    plan: Plan


def vicreg_bwd_empty(
    student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved, options: BackwardOptions
) -> tuple[Tensor, Tensor]:
    """Allocates the gradients of student and target, each [N, D] and contiguous, or empty where not wanted."""
    for_s = student.new_empty(student.shape if options.for_student else 0)
    for_t = target.new_empty(target.shape if options.for_target else 0)
    return for_s, for_t


def launch_vicreg_bwd(
    grads: tuple[Tensor, Tensor], student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None,
    saved: Saved, options: BackwardOptions,
) -> None:  # fmt: skip
    from ..kernels.vicreg_gradient import vicreg_bwd_kernel

    for_student, for_target, plan = options
    student, target = rows_of(student, target)
    (n, d), dtype, dof = student.shape, saved.shift.dtype, max(student.shape[0] - 1, 1)
    if for_target and not plan.invariance:
        grads[1].zero_()
    if not n:
        return
    covariance = plan.covariance and for_student
    raw = student.dtype in HALF and dtype == torch.float32
    counts = planes_in(saved.product, n if plan.gram else d), planes_in(saved.planes, d)
    steps: dict[str, Any] = FLOAT64
    if dtype == torch.float32:
        many = cdiv(n, TILES[0]) * cdiv(d, TILES[0]) >= PROGRAMS // 2
        steps = steps_of(limits_of(student.device), many, counts[0] + 1, 2 * counts[0])
        if not is_raw(student, dtype):
            steps = {**steps, "BLOCK_K": 16}  # rows are loaded element by element, if at all
    with torch.cuda.device_of(student):
        launch(vicreg_bwd_kernel, (cdiv(n, steps["TILE"]) * cdiv(d, steps["TILE"]),),
            student, target, saved.shift, saved.squares, saved.planes, saved.facts, saved.largest,
            saved.product, saved.dots, saved.cross, grad_output, weights,
            grads[0] if for_student else None, grads[1] if for_target else None,
            student.stride(0), target.stride(0), saved.planes.stride(0), saved.product.stride(0), saved.dots.shape[0],
            n, d, dof if plan.unbiased else n, dof, plan.divisor, *plan.weights,
            INVARIANCE=plan.invariance, VARIANCE=plan.variance, COVARIANCE=covariance,
            GAMMA=plan.gamma, EPS=plan.eps, GRAM=plan.gram, WHOLE=is_whole(student, steps),
            PRODUCT_PLANES=counts[0], PLANES=counts[1], GROUP=GROUP, **steps, **operands(student.dtype, dtype, raw),
        )  # fmt: skip


vicreg_fwd = launched("vicreg_fwd", vicreg_fwd_empty, launch_vicreg_fwd)
vicreg_bwd = launched("vicreg_bwd", vicreg_bwd_empty, launch_vicreg_bwd)
