"""VICReg's closed form in plain torch: the CPU fallback. The formulas stand in ops/vicreg.py.

Rows or columns are centred block by block along the inner axis of the product, anew for the gradient: none waits for
the backward. Autocast leaves products in place, and into `out`, as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .columns_torch import centre_block, mean, off, passes
from .vicreg_plan import Plan, weights_of
from .vicreg_triton import BackwardOptions

CPU_PANEL = 128  # rows of a symmetric product that are computed at a time, from the diagonal on

Block = tuple[slice, slice]  # of [N, D]


class Saved(NamedTuple):
    """Tensors that the backward needs of the forward; empty where they are not computed."""

    shift: Tensor  # [2, D], the means: see columns_torch.mean
    squares: Tensor  # [D], of the centred columns
    product: Tensor  # [N, N] or [D, D]
    largest: Tensor  # [], the column that deviates most, where the product is that of rows
    cross: Tensor  # [D], its covariances


def inner_blocks(x: Tensor, gram: bool) -> Iterator[Block]:
    """Yields blocks of all rows and some columns for the product of rows, else of some rows and all columns."""
    for part in passes(x.T if gram else x):
        yield (slice(None), part) if gram else (part, slice(None))


def panels(m: int, like: Tensor) -> list[slice]:
    """Splits the rows of a symmetric [m, m]; not at all where halving it saves less than it costs."""
    if torch.compiler.is_compiling() or like.device.type != "cpu" or m < 2 * CPU_PANEL:
        return [slice(0, m)]
    return [slice(start, start + CPU_PANEL) for start in range(0, m, CPU_PANEL)]


def add_square_(out: Tensor, x: Tensor, beta: float, alpha: float = 1.0) -> None:
    """out = beta out + alpha x x^T, of which only the panels from the diagonal on are computed; see mirror_."""
    for panel in panels(x.shape[0], x):
        upper = out[panel, panel.start :]
        torch.addmm(upper, x[panel], x[panel.start :].T, beta=beta, alpha=alpha, out=upper)


def mirror_(out: Tensor) -> Tensor:
    """Fills what is below the diagonal's panels from what is above them."""
    for panel in panels(out.shape[0], out)[:-1]:
        out[panel.stop :, panel] = out[panel, panel.stop :].T
    return out


def symmetric_product(x: Tensor) -> Tensor:
    """x x^T."""
    out = x.new_empty(x.shape[0], x.shape[0])
    add_square_(out, x, beta=0.0)
    return mirror_(out)


def vicreg_fwd_torch(student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    """loss, invariance, variance, covariance, then shift [2, D], squares [D], product [N, N] or [D, D], and by rows
    largest [], cross [D]; empty where unwanted."""
    n, d = student.shape
    dtype = acc_dtype(student, target)
    zero = student.new_zeros((), dtype=dtype)
    sums = sums_by_rows if plan.gram else sums_by_columns
    error, total, *saved = sums(student, target, dtype, plan)
    squares = saved[1]
    invariance = error / (n * d) if plan.invariance else zero.clone()
    variance = torch.relu(plan.gamma - deviation(squares, n, plan)).mean() if plan.variance else zero.clone()
    covariance = (total / plan.divisor).to(dtype) if plan.covariance else zero.clone()
    inv_weight, var_weight, cov_weight = weights_of(plan, weights)
    loss = inv_weight * invariance + var_weight * variance + cov_weight * covariance
    return loss, invariance, variance, covariance, *saved


def sums_by_rows(student: Tensor, target: Tensor, dtype: torch.dtype, plan: Plan) -> tuple[Tensor, ...]:
    """The sums of squared errors and of squared covariances [], then what vicreg_fwd_torch returns from shift on."""
    n, d = student.shape
    columns = plan.variance or plan.covariance
    error, total = student.new_zeros((), dtype=dtype), student.new_empty(0)
    shift = student.new_empty(2, d if columns else 0, dtype=dtype)
    squares, cross = torch.empty_like(shift[0]), shift.new_empty(d if plan.covariance else 0)
    product = shift.new_empty((n, n) if plan.covariance else (0, 0))
    for part in inner_blocks(student, True):
        block, some = student[part].to(dtype), part[1]
        if plan.invariance:
            error += (block - target[part]).square_().sum()
        if columns:
            block = centre_block(block, shift[:, some])
            torch.sum(block.square(), 0, out=squares[some])
    if not plan.covariance:
        return error, total, shift, squares, product, shift.new_zeros((), dtype=torch.int64), cross
    largest, dof = largest_of(squares), max(n - 1, 1)
    whole = block if block.shape == student.shape else None
    largest_column = column_of(student, shift, largest, whole) / dof
    for part in inner_blocks(student, True):
        some = part[1]
        if whole is None:
            block = off(student[part].to(dtype), shift[:, some])
            zero_column_(block, largest - (some.start or 0))
        else:
            block = whole.index_fill_(1, largest, 0)
        torch.mv(block.T, largest_column, out=cross[some])
        add_square_(product, block, beta=1.0 if some.start else 0.0, alpha=1 / dof)
    total = product_energy(mirror_(product)) + own_squares(squares / dof, cross, largest)
    return error, total, shift, squares, product, largest, cross


def sums_by_columns(student: Tensor, target: Tensor, dtype: torch.dtype, plan: Plan) -> tuple[Tensor, ...]:
    """Returns the same by columns. The product has their squares too, but in the precision of products."""
    n, d = student.shape
    columns = plan.variance or plan.covariance
    error, total = student.new_zeros((), dtype=dtype), student.new_empty(0)
    shift = mean(student, dtype) if columns else error.new_empty(2, 0)
    squares, product = torch.zeros_like(shift[0]), error.new_empty((d, d) if plan.covariance else (0, 0))
    for part in inner_blocks(student, False):
        block = student[part].to(dtype)
        if plan.invariance:
            error += (block - target[part]).square_().sum()
        if columns:
            block = off(block, shift)
        if plan.covariance:
            add_square_(product, block.T, beta=1.0 if part[0].start else 0.0, alpha=1 / max(n - 1, 1))
        if columns:
            squares += block.square_().sum(0)
    if plan.covariance:
        product = mirror_(product) if n else product.zero_()
        product.diagonal().zero_()
        total = product_energy(product)
    return error, total, shift, squares, product, error.new_zeros((), dtype=torch.int64), error.new_empty(0)


def largest_of(squares: Tensor) -> Tensor:
    """The column that deviates most, []; there need be none where no rows are."""
    return squares.argmax() if squares.shape[0] else squares.new_zeros((), dtype=torch.int64)


def own_squares(squares: Tensor, cross: Tensor, largest: Tensor) -> Tensor:
    """Corrects the product of rows in float64: adds the largest column's covariances, subtracts columns' squares."""
    others = squares.index_fill(0, largest, 0)
    return 2 * cross.square().sum(dtype=torch.float64) - others.square().sum(dtype=torch.float64)


def column_of(student: Tensor, shift: Tensor, at: Tensor, whole: Tensor | None) -> Tensor:
    """Returns one column of xc, [N]. whole: xc, where one block was all of it."""
    if whole is not None:
        return whole.index_select(1, at)[:, 0]
    column, mean_of_it = (x.index_select(1, at) for x in (student, shift))
    return off(column.to(shift.dtype), mean_of_it)[:, 0]


def zero_column_(block: Tensor, at: Tensor) -> None:
    """Zeroes column `at`, where the block has it; reads no value on the host."""
    inside = at.clamp(0, block.shape[1] - 1).view(1)
    block.index_copy_(1, inside, torch.where(inside == at, 0, block.index_select(1, inside)))


def product_energy(product: Tensor) -> Tensor:
    """Sums the squares of a product in float64."""
    total = product.new_zeros((), dtype=torch.float64)
    for rows in passes(product):
        total += product[rows].square().sum(dtype=torch.float64)
    return total


def deviation(squares: Tensor, n: int, plan: Plan) -> Tensor:
    return (squares / (max(n - 1, 1) if plan.unbiased and n else n) + plan.eps).sqrt()


def vicreg_bwd_torch(
    student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved, options: BackwardOptions
) -> tuple[Tensor, Tensor]:
    for_student, for_target, plan = options
    shift, squares, product, largest, cross = saved
    inv_weight, var_weight, cov_weight = weights_of(plan, weights)
    n, d = student.shape
    dtype = acc_dtype(student, target)
    for_s = student.new_empty(student.shape if for_student else 0)
    for_t = target.new_empty(target.shape if for_target else 0)
    dof = max(n - 1, 1)
    column = matrix = toward_target = largest_column = None
    if plan.variance:
        sigma = deviation(squares, n, plan)
        pull = grad_output * (-var_weight / (d * (dof if plan.unbiased else max(n, 1))))
        column = torch.where(sigma < plan.gamma, pull, 0) / sigma  # 0 / 0 where eager has it
    if plan.covariance:
        scale = grad_output * (cov_weight * (4 / (plan.divisor * dof)))
        matrix = product * scale
        if plan.gram:
            own = squares.index_fill(0, largest, 0) * (scale / dof)
            column = -own if column is None else column - own
            cross = cross * scale
    if plan.invariance:
        toward_target = grad_output * (inv_weight * (2 / max(n * d, 1)))
    in_place = for_student and for_s.dtype == dtype
    for part in inner_blocks(student, plan.gram):
        block = student[part].to(dtype)
        grad = for_s[part] if in_place else block.new_empty(block.shape)
        if toward_target is None:
            grad.zero_()
        else:
            torch.sub(block, target[part], out=grad).mul_(toward_target)
        if for_target:
            for_t[part] = -grad
        if not for_student:
            continue
        if column is not None or matrix is not None:
            block = off(block, shift[:, part[1]])
        if column is not None:
            grad.addcmul_(block, column[part[1]])
        if matrix is not None:
            # Transposed, which it equals: MKL's product of two or three rows with a matrix as it lies is less accurate.
            grad.addmm_(*((matrix, block) if plan.gram else (block, matrix.T)))
        if matrix is not None and plan.gram:
            if largest_column is None:
                largest_column = column_of(student, shift, largest, block if block.shape == student.shape else None)
            grad.addr_(largest_column, cross[part[1]])
        if not in_place:
            for_s[part] = grad
    return for_s, for_t
