"""VICReg's launchers and dispatcher ops: four launches forward, one backward.

float32 students are multiplied as planes: sums of bfloat16 numbers, three for float32's accuracy or two where torch
allows TF32. Students of 16 bits are multiplied as they are, or as planes if their means are large or a column
dominates. float64 has instructions of its own. The product, [N, N] or [D, D], and the student are saved for the
backward as planes. All splits of a product hold at most as many numbers as the student.

Each launch serves the ranks of a group, too. By rows the student is then the rows of all ranks, of which `own` are this
rank's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from . import vicreg_tiles as tiling
from .columns import COLUMNS, ROWS, runs_of
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch
from .tickets import ticket
from .vicreg_plan import BackwardOptions, Grads, Plan, Terms, empty_grads, empty_terms, terms_of
from .vicreg_tiles import HALF, PAD, PIECE, TILES, is_raw, padded, planes_in


class Saved(NamedTuple):
    """Tensors that the backward needs of the forward; empty where they are not computed."""

    shift: Tensor  # [D]; the mean of a column is its first element plus this
    squares: Tensor  # [D], of the centred columns
    facts: Tensor  # [7] float64, of all columns: see vicreg_statistics_kernel
    largest: Tensor  # [3], the column that is left out of planes, or -1 where the student is multiplied as it is; N;
    # whether one plane of the product is enough there
    planes: Tensor  # [padded N, planes * padded D] of the centred student; unwritten where it is not used
    product: Tensor  # [padded N, planes * padded N] or [padded D, planes * padded D]
    dots: Tensor  # [pieces, D]: parts of the product of columns with what is subtracted from rows after it
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
    dtype = acc_dtype(student, target)
    return Forward(*empty_terms(student, dtype), *empty_saved(student, dtype, plan))


def empty_saved(student: Tensor, dtype: torch.dtype, plan: Plan, own: slice | None = None) -> Saved:
    (n, d), half = student.shape, student.dtype in HALF
    shift, squares = (student.new_empty(d, dtype=dtype) for _ in range(2))
    facts, largest = student.new_empty(7, dtype=torch.float64), student.new_empty(3, dtype=torch.int32)
    shapes: dict[str, Any] = {"planes": 0, "product": 0, "dots": 0, "cross": 0}
    plane = dtype if dtype == torch.float64 else torch.bfloat16
    dtypes = {"planes": plane, "product": student.dtype if half and dtype == torch.float32 else plane}
    if plan.covariance:
        size, count = n if plan.gram else d, tiling.planes_of_products(dtype)
        rows, more = (size, 0) if own is None else (own.stop - own.start, PAD)  # the last tile may reach past all rows
        shapes["planes"] = padded(n) + more, count * padded(d)
        shapes["product"] = padded(rows), (2 if half and dtype == torch.float32 else count) * padded(size)
        if plan.gram:
            shapes["cross"] = d
        elif half and dtype == torch.float32:
            shapes["dots"] = cdiv(padded(d), PIECE), d
    others = (student.new_empty(x, dtype=dtypes.get(name, dtype)) for name, x in shapes.items())
    return Saved(shift, squares, facts, largest, *others)


def launch_vicreg_fwd(out: Forward, student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> None:
    student, target = rows_of(student, target)
    terms, saved = out[:4], Saved(*out[4:])
    if not student.shape[0]:
        for x in saved:
            x.zero_()
        nothing = saved.facts[0]
        for term, x in zip(terms, terms_of(nothing, 0, saved.squares, nothing, 1, weights, plan), strict=True):
            term.copy_(x)
        return
    with torch.cuda.device_of(student):
        raw = is_raw(student, saved.shift.dtype)
        launch_statistics(saved, student, target, raw, weights, terms, plan)
        if plan.covariance:
            crosses = launch_planes(saved, student, plan)
            parts, row_sums = launch_product(saved, student, raw, plan)
            launch_finish(saved, student, parts, row_sums, crosses, raw, weights, terms, plan)


def statistics_options(dtype: torch.dtype) -> dict[str, Any]:
    return {"BLOCK_N": ROWS, "BLOCK_D": COLUMNS, "ACC": acc_of(dtype), "num_warps": 8, "enable_fp_fusion": True}


def launch_statistics(
    saved: Saved,
    student: Tensor,
    target: Tensor | None,
    raw: bool,
    weights: Tensor | None,
    terms: Terms | None,
    plan: Plan,
) -> None:
    """Launch the column statistics. target: None if no errors are summed."""
    from ..kernels.vicreg import vicreg_statistics_kernel

    (n, d), dtype = student.shape, saved.shift.dtype
    runs, blocks = runs_of(n, d), cdiv(d, COLUMNS)
    parts = [student.new_empty((runs.number, d), dtype=t) for t in (torch.float64, dtype)]
    target = target if plan.invariance else None
    errors = None if target is None else student.new_empty(runs.number * blocks, dtype=torch.float64)
    last = (None,) * 5 if plan.covariance or terms is None else (weights, *terms)
    launch(vicreg_statistics_kernel, (blocks, runs.number),
        student, target, *parts, errors, ticket(student),
        saved.shift, saved.squares, saved.facts, saved.largest, *last,
        student.stride(0), 0 if target is None else target.stride(0),
        n, d, runs.length, runs.number, max(n - 1, 1) if plan.unbiased else n, *plan.weights,
        GAMMA=plan.gamma, EPS=plan.eps, VARIANCE=plan.variance, GRAM=plan.gram, RAW=raw,
        RUNS=runs.most, **statistics_options(dtype), **tiling.registers_on(student.device, dtype, 128),
    )  # fmt: skip


def launch_planes(saved: Saved, student: Tensor, plan: Plan) -> Tensor | None:
    """Returns parts of the largest column's covariances, by rows."""
    from ..kernels.vicreg import vicreg_planes_kernel

    (n, d), dtype = student.shape, saved.shift.dtype
    runs = runs_of(n, d)
    crosses = student.new_empty((runs.number, d), dtype=dtype) if plan.gram else None
    launch(vicreg_planes_kernel, (cdiv(padded(d), COLUMNS), runs.number),
        student, saved.shift, saved.largest, saved.planes, crosses, student.stride(0), saved.planes.stride(0), n, d,
        padded(n), runs.length, max(n - 1, 1),
        GRAM=plan.gram, PLANES=planes_in(saved.planes, d), **statistics_options(dtype),
    )  # fmt: skip
    return crosses


def launch_product(
    saved: Saved, student: Tensor, raw: bool, plan: Plan, own: slice | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns the splits of the product [splits, size or own rows, size], and by rows parts of its rows' sums."""
    from ..kernels.vicreg_product import vicreg_product_kernel

    (n, d), dtype = student.shape, saved.shift.dtype
    size, depth = (n, d) if plan.gram else (d, n)
    low, rows = (None, size) if own is None else (own.start, own.stop - own.start)
    count = planes_in(saved.planes, d)
    steps: dict[str, Any] = tiling.FLOAT64
    if dtype == torch.float32:
        large, high = cdiv(size, TILES[0]), cdiv(rows, TILES[0])
        many = (large * (large + 1) // 2 if own is None else high * large) >= tiling.PROGRAMS // 8
        steps = tiling.steps_of(tiling.limits_of(student.device), many, 2 if raw else 2 * count, 2 * count)
    tiles, step = cdiv(size, steps["TILE"]), max(steps["BLOCK_K"], steps["PLANES_K"])
    high = cdiv(rows, steps["TILE"])
    programs = tiles * (tiles + 1) // 2 if own is None else high * tiles
    splits, depth_a_split = tiling.split(size, depth, programs, step)
    parts = student.new_empty((splits, rows, size), dtype=dtype)
    row_sums = student.new_empty((splits * high, size), dtype=dtype) if raw and plan.gram else None
    launch(vicreg_product_kernel, (programs, splits),
        student, saved.largest, saved.planes, parts, row_sums,
        student.stride(0), saved.planes.stride(0), low, rows, size, depth, depth_a_split, tiles,
        GRAM=plan.gram, WHOLE=tiling.is_whole(student, steps) and not rows % steps["TILE"], PLANES=count,
        **steps, **tiling.operands(student.dtype, dtype, raw),
    )  # fmt: skip
    return parts, row_sums


def launch_finish(
    saved: Saved, student: Tensor, parts: Tensor, row_sums: Tensor | None, crosses: Tensor | None, raw: bool,
    weights: Tensor | None, terms: Terms | None, plan: Plan, own: slice | None = None, about: Tensor | None = None,
) -> None:  # fmt: skip
    """raw: whether means come off here, where the student was multiplied as it is; about: see vicreg_finish_kernel."""
    from ..kernels.vicreg_finish import vicreg_finish_kernel

    (splits, rows, size), d, dtype = parts.shape, student.shape[1], saved.shift.dtype
    pieces = cdiv(padded(size), PIECE)
    programs = pieces * (pieces + 1) // 2
    if own is not None:
        programs = cdiv(padded(rows), PIECE) * pieces
    launch(vicreg_finish_kernel, (programs,),
        parts, row_sums, student, saved.shift, saved.squares, saved.facts, saved.largest, crosses, about,
        saved.product, saved.planes, saved.dots if saved.dots.numel() else None, saved.cross,
        student.new_empty(programs, dtype=torch.float64), ticket(student), weights, *(terms or (None,) * 4),
        student.stride(0), saved.planes.stride(0), saved.product.stride(0), pieces,
        None if own is None else own.start, rows, d, size, splits,
        0 if row_sums is None else len(row_sums), 0 if crosses is None else len(crosses), plan.divisor, *plan.weights,
        GRAM=plan.gram, RAW=raw, PLANES=planes_in(saved.product, size), X_PLANES=planes_in(saved.planes, d),
        PIECE=PIECE, ACC=acc_of(dtype), num_warps=4, enable_fp_fusion=True,
        **tiling.registers_on(student.device, dtype, 128),
    )  # fmt: skip


def vicreg_bwd_empty(
    student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved, options: BackwardOptions
) -> Grads:
    return empty_grads(student, target, options)


def launch_vicreg_bwd(
    grads: Grads, student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved,
    options: BackwardOptions, own: slice | None = None,
) -> None:  # fmt: skip
    from ..kernels.vicreg_gradient import vicreg_bwd_kernel

    for_student, for_target, plan = options
    student, target = rows_of(student, target)
    (n, d), dtype, size = student.shape, saved.shift.dtype, student.shape[0] if plan.gram else student.shape[1]
    low, rows = (None, n) if own is None else (own.start, own.stop - own.start)
    if for_target and not plan.invariance:
        grads[1].zero_()
    if not rows:
        return
    raw = student.dtype in HALF and dtype == torch.float32
    counts = planes_in(saved.product, size), planes_in(saved.planes, d)
    steps: dict[str, Any] = tiling.FLOAT64
    if dtype == torch.float32:
        many = cdiv(rows, TILES[0]) * cdiv(d, TILES[0]) >= tiling.PROGRAMS // 2
        steps = tiling.steps_of(tiling.limits_of(student.device), many, counts[0] + 1, 2 * counts[0])
        if not is_raw(student, dtype):
            steps = {**steps, "BLOCK_K": 16}  # rows are loaded element by element, if at all
    with torch.cuda.device_of(student):
        launch(vicreg_bwd_kernel, (cdiv(rows, steps["TILE"]) * cdiv(d, steps["TILE"]),),
            student, target, saved.shift, saved.squares, saved.planes, saved.facts, saved.largest,
            saved.product, saved.dots if saved.dots.numel() else None, saved.cross, grad_output, weights,
            grads[0] if for_student else None, grads[1] if for_target else None,
            student.stride(0), target.stride(0), saved.planes.stride(0), saved.product.stride(0), saved.dots.shape[0],
            low, rows, size, d, plan.divisor, *plan.weights,
            INVARIANCE=plan.invariance, VARIANCE=plan.variance, COVARIANCE=plan.covariance and for_student,
            UNBIASED=plan.unbiased, GAMMA=plan.gamma, EPS=plan.eps, GRAM=plan.gram,
            WHOLE=tiling.is_whole(student, steps), PRODUCT_PLANES=counts[0], PLANES=counts[1], GROUP=tiling.GROUP,
            **steps, **tiling.operands(student.dtype, dtype, raw), **tiling.registers_on(student.device, dtype, 255),
        )  # fmt: skip


vicreg_fwd = launched("vicreg_fwd", vicreg_fwd_empty, launch_vicreg_fwd)
vicreg_bwd = launched("vicreg_bwd", vicreg_bwd_empty, launch_vicreg_bwd)
