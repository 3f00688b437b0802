"""VICReg's closed form in plain torch: the CPU fallback. The formulas stand in ops/vicreg.py.

Rows or columns are centred block by block along the inner axis of the product, and again for the gradient, so no
centred copy is saved. Autocast does not change products in place, or into `out`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .columns_torch import centre_block, mean, off, passes
from .vicreg_exchange import Ranks
from .vicreg_plan import BackwardOptions, Grads, Plan, Terms, deviation, dof_of, empty_grads, terms_of, weights_of

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
    """Split the rows of a symmetric [m, m], unless halving it saves less than it costs."""
    if torch.compiler.is_compiling() or like.device.type != "cpu" or m < 2 * CPU_PANEL:
        return [slice(0, m)]
    return [slice(start, start + CPU_PANEL) for start in range(0, m, CPU_PANEL)]


def add_square_(out: Tensor, x: Tensor, beta: float, alpha: float = 1.0) -> None:
    """Compute out = beta out + alpha x x^T, but only the panels from the diagonal on; see mirror_."""
    for panel in panels(x.shape[0], x):
        upper = out[panel, panel.start :]
        torch.addmm(upper, x[panel], x[panel.start :].T, beta=beta, alpha=alpha, out=upper)


def mirror_(out: Tensor) -> Tensor:
    """Fill the part below the diagonal's panels with the part above them."""
    for panel in panels(out.shape[0], out)[:-1]:
        out[panel.stop :, panel] = out[panel, panel.stop :].T
    return out


def vicreg_fwd_torch(student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
    """Return loss, invariance, variance and covariance, then shift [2, D], squares [D], product [N, N] or [D, D], and
    by rows largest [], cross [D]. Results that are not needed are empty."""
    sums = sums_by_rows if plan.gram else sums_by_columns
    error, rows, total, *saved = sums(student, target, plan)
    return *terms_of(error, rows, saved[1], total, student.shape[1], weights, plan), *saved


def sums_by_rows(student: Tensor, target: Tensor, plan: Plan, ranks: Ranks | None = None) -> tuple[Any, ...]:
    """Return the sum of squared errors [], the number of rows and the sum of squared covariances [], then what
    vicreg_fwd_torch returns from shift on.

    ranks: the ranks whose gathered rows are the student. Target and product are those of this rank alone.
    """
    (n, d), dtype = student.shape, acc_dtype(student, target)
    own = slice(None) if ranks is None else ranks.own
    columns = plan.variance or plan.covariance
    error, total = student.new_zeros((), dtype=dtype), student.new_empty(0)
    shift = student.new_empty(2, d if columns else 0, dtype=dtype)
    squares, cross = torch.empty_like(shift[0]), shift.new_empty(d if plan.covariance else 0)
    product = shift.new_empty((target.shape[0], n) if plan.covariance else (0, 0))
    for part in inner_blocks(student, True):
        block, some = student[part].to(dtype), part[1]
        if plan.invariance:
            error += (block[own] - target[part]).square_().sum()
        if columns:
            block = centre_block(block, shift[:, some])
            torch.sum(block.square(), 0, out=squares[some])
    if not plan.covariance:
        return error, n, total, shift, squares, product, shift.new_zeros((), dtype=torch.int64), cross
    largest, dof = largest_of(squares), max(n - 1, 1)
    if ranks is not None:
        largest = ranks.first(largest)
    largest_column = column_of(student, shift, largest) / dof
    one_block = block.shape == student.shape
    for part in inner_blocks(student, True):
        some = part[1]
        if not one_block:
            block = off(student[part].to(dtype), shift[:, some])
        zero_column_(block, largest - (some.start or 0))
        torch.mv(block.T, largest_column, out=cross[some])
        beta = 1.0 if some.start else 0.0
        if ranks is None:
            add_square_(product, block, beta=beta, alpha=1 / dof)
        else:
            torch.addmm(product, block[own], block.T, beta=beta, alpha=1 / dof, out=product)
    total = product_energy(product if ranks is not None else mirror_(product))
    if ranks is not None:
        error, total = ranks.sum(torch.stack([error.to(total), total])).unbind()
    total = total + own_squares(squares / dof, cross, largest)
    return error, n, total, shift, squares, product, largest, cross


def sums_by_columns(student: Tensor, target: Tensor, plan: Plan, ranks: Ranks | None = None) -> tuple[Any, ...]:
    """Return the same by columns. Their squares are on the product's diagonal, too, but in the precision of products.

    ranks: the ranks of which this one has some rows. The sums and the product are those of all.
    """
    (n, d), dtype = student.shape, acc_dtype(student, target)
    columns = plan.variance or plan.covariance
    error, total = student.new_zeros((), dtype=dtype), student.new_empty(0)
    rows: int | Tensor = n
    shift = mean(student, dtype) if columns else error.new_empty(2, 0)
    squares, product = torch.zeros_like(shift[0]), error.new_empty((d, d) if plan.covariance else (0, 0))
    alpha = 1 / max(n - 1, 1) if ranks is None else 1.0
    for part in inner_blocks(student, False):
        block = student[part].to(dtype)
        if plan.invariance:
            error += (block - target[part]).square_().sum()
        if columns:
            block = off(block, shift)
        if plan.covariance:
            add_square_(product, block.T, beta=1.0 if part[0].start else 0.0, alpha=alpha)
        if columns:
            squares += block.square_().sum(0)
    if plan.covariance:
        product = mirror_(product) if n else product.zero_()
    if ranks is not None:
        moments = ranks.start_moments(shift.sum(0, dtype=torch.float64), n, error)()
        error, rows, away = moments.error, moments.rows.to(dtype), moments.away.to(dtype)
        if plan.covariance:
            product.addr_(away, away, alpha=n)
        near = moments.mean.to(dtype)
        shift = torch.stack([near, (moments.mean - near).to(dtype)])
        squares, product = moments.sum(moments.squares(squares), product)
        product /= dof_of(rows)
    if plan.covariance:
        product.diagonal().zero_()
        total = product_energy(product)
    return error, rows, total, shift, squares, product, error.new_zeros((), dtype=torch.int64), error.new_empty(0)


def vicreg_ranks_torch(
    grads: Grads, student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None,
    options: BackwardOptions, ranks: Ranks,
) -> Terms:  # fmt: skip
    """Fills the gradients, and returns the loss and its terms over the rows of all ranks."""
    plan, own = options.plan, slice(None)
    if plan.gram:
        student, own = ranks.start_gather(student)(), ranks.own
    error, rows, total, *saved = (sums_by_rows if plan.gram else sums_by_columns)(student, target, plan, ranks)
    if options.for_student or options.for_target:
        fill_gradients(grads, student, target, grad_output, weights, Saved(*saved), options, own, rows)
    return terms_of(error, rows, saved[1], total, student.shape[1], weights, plan)


def largest_of(squares: Tensor) -> Tensor:
    """Return the column that deviates most, []; any column if there are no rows."""
    return squares.argmax() if squares.shape[0] else squares.new_zeros((), dtype=torch.int64)


def own_squares(squares: Tensor, cross: Tensor, largest: Tensor) -> Tensor:
    """Corrects the product of rows in float64: adds the largest column's covariances, subtracts columns' squares."""
    others = squares.index_fill(0, largest, 0)
    return 2 * cross.square().sum(dtype=torch.float64) - others.square().sum(dtype=torch.float64)


def column_of(student: Tensor, shift: Tensor, at: Tensor) -> Tensor:
    """Returns one column of xc, [N]."""
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


def vicreg_bwd_torch(
    student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved, options: BackwardOptions
) -> Grads:
    grads = empty_grads(student, target, options)
    fill_gradients(grads, student, target, grad_output, weights, saved, options)
    return grads


def fill_gradients(
    grads: Grads, student: Tensor, target: Tensor, grad_output: Tensor, weights: Tensor | None, saved: Saved,
    options: BackwardOptions, own: slice = slice(None), rows: int | Tensor | None = None,
) -> None:  # fmt: skip
    """Fill the gradients. own: the rows of the student that have one; rows: how many rows all ranks have."""
    for_student, for_target, plan = options
    (for_s, for_t), (shift, squares, product, largest, cross) = grads, saved
    inv_weight, var_weight, cov_weight = weights_of(plan, weights)
    d, dtype = student.shape[1], acc_dtype(student, target)
    if rows is None or isinstance(rows, int):
        rows = max(student.shape[0], 1)
    dof = dof_of(rows)
    column = matrix = toward_target = largest_column = None
    if plan.variance:
        sigma = deviation(squares, rows, plan)
        pull = grad_output * (-var_weight / (d * (dof if plan.unbiased else rows)))
        column = torch.where(sigma < plan.gamma, pull, 0) / sigma  # 0 / 0 where eager has it
    if plan.covariance:
        scale = grad_output * (cov_weight * (4 / (plan.divisor * dof)))
        matrix = product * scale
        if plan.gram:
            alone = squares.index_fill(0, largest, 0) * (scale / dof)
            column = -alone if column is None else column - alone
            cross = cross * scale
            largest_column = column_of(student, shift, largest)[own]
    if plan.invariance:
        toward_target = grad_output * (inv_weight * (2 / (rows * d)))
    in_place = for_student and for_s.dtype == dtype
    for part in inner_blocks(student, plan.gram):
        block = student[part].to(dtype)
        mine = block[own]
        grad = for_s[part] if in_place else mine.new_empty(mine.shape)
        if toward_target is None:
            grad.zero_()
        else:
            torch.sub(mine, target[part], out=grad).mul_(toward_target)
        if for_target:
            for_t[part] = -grad
        if not for_student:
            continue
        if column is not None or matrix is not None:
            block = off(block, shift[:, part[1]])
        if column is not None:
            grad.addcmul_(block[own], column[part[1]])
        if matrix is not None:
            # Transposed, which it equals: MKL's product of two or three rows with a matrix as it lies is less accurate.
            grad.addmm_(*((matrix, block) if plan.gram else (block, matrix.T)))
        if largest_column is not None:
            grad.addr_(largest_column, cross[part[1]])
        if not in_place:
            for_s[part] = grad
