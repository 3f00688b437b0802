"""Computes VICReg over the rows of all ranks, each rank a part; ops/vicreg.py has the formulas.

Two routes. With W ranks, N rows in all and N_r here:

    rows       every rank gets all rows, N d numbers, and computes its own of [N, N] and of the gradient: 4 N_r N d
    columns    every rank computes xc_r^T xc_r, and d^2 numbers are summed over the ranks: 4 N_r d^2, less by symmetry

The cheaper journey is chosen: the padded rows in the student's dtype, received once, or the sums, which pass twice. It
has to be the same on every rank, and a rank knows no other's batch: so "auto" and the route by rows exchange the
ranks' counts first, W integers on the host (see all_counts). `route="covariance"` exchanges nothing: all its shapes are
known, and counts stay on the device, so that the host never waits and a CUDA graph can hold it. Without a covariance
no product is needed, nor a choice: 3 d numbers are summed for the variance, and none for the invariance alone.

All this is one dispatcher op, since the shapes between its collectives depend on the other ranks. It computes the
product's part of the gradient as well, [N_r, d]: the backward communicates nothing. Every rank must bring the same
gradient of the loss, as data-parallel training does; a rank's gradient is then W times its part of the full batch's,
and the mean that DDP or FSDP takes is the full batch's gradient (see SumOverRanks).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import all_counts, all_gather, all_reduce, gather_rows, group_of
from ..reference.dtypes import acc_dtype, without_autocast
from .columns_torch import centre
from .dispatch import Op
from .function import make_function
from .vicreg_plan import Plan, flags, make_plan
from .vicreg_torch import largest_of, own_squares, product_energy, symmetric_product

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rows_travel_lighter(counts: list[int], width: int, itemsize: int, sum_itemsize: int) -> bool:
    """Compares the bytes that a rank receives: the padded rows of the others, or a ring's two passes of the sums."""
    others = len(counts) - 1
    return others * max(counts) * width * itemsize < 2 * others * width * width * sum_itemsize / len(counts)


class RanksOptions(NamedTuple):
    group: str
    world: int
    route: str
    plan: Plan


class Forward(NamedTuple):
    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    rows: Tensor  # [], how many in all
    centred: Tensor  # [N_r, D]
    squares: Tensor  # [D]
    spread: Tensor  # [N_r, D], Z


def vicreg_ranks_empty(student: Tensor, target: Tensor, options: RanksOptions) -> Forward:
    dtype = acc_dtype(student, target)
    invariance, variance, covariance, count = (student.new_empty((), dtype=dtype) for _ in range(4))
    centred, spread = (student.new_empty(student.shape, dtype=dtype) for _ in range(2))
    squares = student.new_empty(student.shape[1], dtype=dtype)
    return Forward(invariance, variance, covariance, count, centred, squares, spread)


def vicreg_ranks_torch(student: Tensor, target: Tensor, options: RanksOptions) -> Forward:
    plan, route, ranks = options.plan, options.route, group_of(options.group)
    dtype, width = acc_dtype(student, target), student.shape[1]
    error = student.new_zeros((), dtype=dtype)
    if plan.invariance:
        error = (student.to(dtype) - target).square().sum()
    by_rows = plan.covariance and route == "gram"
    counts: list[int] = []
    if plan.covariance and route != "covariance":
        counts = all_counts(student.shape[0], student.device, ranks)
        if sum(counts) == 1:
            warnings.warn(
                "vicreg_loss got one row in all: its variance and covariance are 0 by convention", stacklevel=2
            )
        by_rows = by_rows or rows_travel_lighter(counts, width, student.element_size(), dtype.itemsize)
    with without_autocast(student):
        sums = sums_by_rows if by_rows else sums_by_columns
        error, count, centred, squares, total, spread = sums(student, error, counts, ranks, plan)
    dof = (count - 1).clamp(min=1)
    sigma = (squares / (torch.where(count == 0, count, dof) if plan.unbiased else count) + plan.eps).sqrt()
    zero = torch.zeros_like(count)
    variance = torch.relu(plan.gamma - sigma).mean() if plan.variance else zero
    invariance = error / (count * width) if plan.invariance else error
    return Forward(invariance, variance, total / plan.divisor, count.clone(), centred, squares, spread)


def sums_by_rows(student: Tensor, error: Tensor, counts: list[int], ranks: ProcessGroup, plan: Plan) -> tuple:
    every = gather_rows(student, counts, ranks)
    xc = centre(every, error.dtype)[0] if every.shape[0] else every.to(error.dtype)
    first = sum(counts[: ranks.rank()])
    mine = xc[first : first + student.shape[0]]
    squares = xc.square().sum(0)
    count = torch.full_like(error, every.shape[0])
    dof = max(every.shape[0] - 1, 1)
    # The first rank's: of columns that are alike another machine's sums might choose another.
    largest = all_gather(largest_of(squares).view(1), ranks)[:1]
    largest_values = xc.index_select(1, largest)
    largest_column = mine.index_select(1, largest)[:, 0]
    xc.index_fill_(1, largest, 0)
    product = mine @ xc.T / dof
    cross = torch.mv(mine.T, largest_column)
    xc.index_copy_(1, largest, largest_values)
    sums = torch.cat([torch.stack([error, product_energy(product)]), cross])  # float64, as the energy is
    sums = all_reduce(sums, ranks)
    error, total, cross = sums[0], sums[1], (sums[2:] / dof).to(mine.dtype)
    own = squares / dof
    total = total + own_squares(own, cross, largest)
    spread = (product @ xc).addcmul_(mine, own.index_fill(0, largest, 0), value=-1).addr_(largest_column, cross)
    return error.to(mine.dtype), count, mine.clone(), squares, total.to(mine.dtype), spread


def sums_by_columns(student: Tensor, error: Tensor, counts: list[int], ranks: ProcessGroup, plan: Plan) -> tuple:
    """Leaves out the covariance's product where it is not wanted, and the squares where the variance is not either."""
    y, width = student.to(error.dtype), student.shape[1]
    if not (plan.variance or plan.covariance):
        error, count = all_reduce(torch.stack([error, torch.full_like(error, y.shape[0])]), ranks).unbind()
        return error, count, torch.zeros_like(y), y.new_zeros(width), torch.zeros_like(error), torch.zeros_like(y)
    sums = all_reduce(torch.cat([y.sum(0), torch.stack([error, torch.full_like(error, y.shape[0])])]), ranks)
    error, count = sums[width:].unbind()
    xc = y - sums[:width] / count.clamp(min=1)
    # The mean was rounded, which a large one shows: what is left of it comes with the second journey.
    products = [symmetric_product(xc.T)] if plan.covariance else []
    sums = all_reduce(torch.cat([*products, torch.stack([xc.square().sum(0), xc.sum(0)])]), ranks)
    left = sums[-1] / count.clamp(min=1)
    xc, squares = xc - left, sums[-2] - count * left.square()
    if not plan.covariance:
        return error, count, xc, squares, torch.zeros_like(error), torch.zeros_like(xc)
    product = (sums[:-2] - count * torch.outer(left, left)).fill_diagonal_(0) / (count - 1).clamp(min=1)
    # Transposed, which it equals: see vicreg_torch.py.
    return error, count, xc, squares, product.square().sum(), xc @ product.T


vicreg_ranks = Op("vicreg_ranks", vicreg_ranks_empty, vicreg_ranks_torch)


def forward(student: Tensor, target: Tensor, options: RanksOptions, backend: str) -> tuple[Tensor, ...]:
    """The three terms, then what it saves."""
    return vicreg_ranks(student, target, options)


def backward(
    ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], needs_grad: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            'vicreg_loss over a group has no second derivatives in its fused form; use backend="reference"'
        )
    student, target, count, centred, squares, spread = saved
    plan, world, width = ctx.options.plan, ctx.options.world, student.shape[1]
    grad_invariance, grad_variance, grad_covariance = (None if g is None else world * g for g in grads)
    dof = (count - 1).clamp(min=1)
    over = dof if plan.unbiased else count
    grad = torch.zeros_like(centred)
    toward_target = torch.zeros_like(centred)
    if plan.invariance and grad_invariance is not None:
        toward_target = (student.to(centred.dtype) - target) * (2 * grad_invariance / (count * width))
        grad = toward_target
    if plan.variance and grad_variance is not None:
        sigma = (squares / over + plan.eps).sqrt()
        grad = grad - centred * (torch.where(sigma < plan.gamma, grad_variance / (width * over), 0) / sigma)
    if plan.covariance and grad_covariance is not None:
        grad = grad + spread * (4 * grad_covariance / (plan.divisor * dof))
    return grad.to(student.dtype), -toward_target.to(target.dtype)


over_ranks = make_function(
    "VICRegOverRanks", forward, backward, None, inputs=2, outputs=3, saved=3, twice=True, vmap=None
)


def vicreg_loss_over_ranks(
    student: Tensor,  # [N_r, D]
    target: Tensor,  # [N_r, D]
    *,
    group: ProcessGroup,
    route: str,
    inv_weight: float | Tensor,
    var_weight: float | Tensor,
    cov_weight: float | Tensor,
    **more: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights: dict[str, Any] = {"inv_weight": inv_weight, "var_weight": var_weight, "cov_weight": cov_weight}
    plan = make_plan(*student.shape, **flags(weights), **more, route=route)
    options = RanksOptions(group.group_name, group.size(), route, plan)
    invariance, variance, covariance = over_ranks(student, target, options, "torch")[:3]
    return inv_weight * invariance + var_weight * variance + cov_weight * covariance, invariance, variance, covariance
