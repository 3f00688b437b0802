"""VICReg over the rows of all ranks, of which each computes a part. See ops/vicreg.py for each route's formulas.

With W ranks, N rows in all and N_r here, a rank computes 4 N_r N d multiply-adds by rows, and 4 N_r d^2 by columns,
less by symmetry. "auto" takes the route that moves fewer bytes: the padded rows in the student's dtype are received
once, and the sums pass twice. All ranks must take the same route, and a rank does not know the others' batches. So
"auto" and the route by rows first exchange the ranks' counts, W integers on the host (see all_counts).
`route="covariance"` exchanges no counts: all its shapes are known, so the host never waits, and a CUDA graph can hold
it. If there is no covariance, neither a product nor a choice is needed: 3 d numbers are summed for the variance, and
none for the invariance.

All this is one dispatcher op, since the shapes between its collectives depend on the other ranks. Its backward scales
the gradient, and communicates nothing. Every rank must bring the same gradient of the loss, as data-parallel training
does. A rank's gradient is then W times its part of the full batch's, so the mean that DDP or FSDP takes is the full
batch's gradient (see SumOverRanks).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import all_counts, group_of
from ..reference.dtypes import acc_dtype, without_autocast
from .dispatch import Op
from .function import make_function
from .vicreg_exchange import Ranks
from .vicreg_plan import BackwardOptions, empty_grads, empty_terms, make_call
from .vicreg_ranks_triton import vicreg_ranks_triton
from .vicreg_torch import vicreg_ranks_torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rows_travel_lighter(counts: list[int], width: int, itemsize: int, sum_itemsize: int) -> bool:
    """Whether a rank receives fewer bytes by rows: the others' padded rows, or two passes of the sums in a ring."""
    others = len(counts) - 1
    return others * max(counts) * width * itemsize < 2 * others * width * width * sum_itemsize / len(counts)


class RanksOptions(NamedTuple):
    group: str
    route: str
    backend: str
    backward: BackwardOptions


class Forward(NamedTuple):
    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor
    grad_student: Tensor  # [N_r, D] in the dtype of the arithmetic, for a gradient of the loss of 1; empty if unwanted
    grad_target: Tensor


def vicreg_ranks_empty(student: Tensor, target: Tensor, weights: Tensor | None, options: RanksOptions) -> Forward:
    dtype = acc_dtype(student, target)
    return Forward(*empty_terms(student, dtype), *empty_grads(student, target, options.backward, dtype))


def run_vicreg_ranks(student: Tensor, target: Tensor, weights: Tensor | None, options: RanksOptions) -> Forward:
    group, plan = group_of(options.group), options.backward.plan
    counts = counts_by_rows(student, target, options.route, group) if plan.covariance else []
    grads = empty_grads(student, target, options.backward, acc_dtype(student, target))
    backward = options.backward._replace(plan=plan._replace(gram=bool(counts)))
    run = vicreg_ranks_triton if options.backend == "triton" else vicreg_ranks_torch
    with without_autocast(student):
        terms = run(
            grads, student, target, grads[0].new_full((), group.size()), weights, backward, Ranks(group, counts)
        )
    return Forward(*terms, *grads)


def counts_by_rows(student: Tensor, target: Tensor, route: str, group: ProcessGroup) -> list[int]:
    """Return every rank's number of rows if rows are gathered, and nothing by columns."""
    if route == "covariance":
        return []
    counts = all_counts(student.shape[0], student.device, group)
    if sum(counts) == 1:
        warnings.warn("vicreg_loss got one row in all: its variance and covariance are 0 by convention", stacklevel=2)
    itemsizes = student.element_size(), acc_dtype(student, target).itemsize
    return counts if route == "gram" or rows_travel_lighter(counts, student.shape[1], *itemsizes) else []


vicreg_ranks = Op("vicreg_ranks", vicreg_ranks_empty, run_vicreg_ranks)


def forward(
    student: Tensor, target: Tensor, weights: Tensor | None, options: RanksOptions, backend: str
) -> tuple[Tensor, ...]:
    """Return the loss and its terms, then what the backward needs."""
    return vicreg_ranks(student, target, weights, options)


def backward(ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor], needs_grad: tuple[bool, bool]) -> tuple:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"vicreg_loss over a group has no second derivatives on {ctx.backend}; use backend='reference'"
        )
    *inputs, _, for_student, for_target = saved
    found = zip(inputs, (for_student, for_target), needs_grad, strict=True)
    return tuple((grads[0] * grad).to(x.dtype) if needs else None for x, grad, needs in found)


over_ranks = make_function(
    "VICRegOverRanks", forward, backward, None, inputs=2, saved=4, twice=True, vmap=None
)  # fmt: skip


def vicreg_loss_over_ranks(
    student: Tensor,  # [N_r, D]
    target: Tensor,  # [N_r, D]
    *,
    group: ProcessGroup,
    backend: str,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return the loss and its three terms."""
    weights, plan = make_call(student, target, True, **options)
    for_student, for_target = (torch.is_grad_enabled() and x.requires_grad for x in (student, target))
    ranks = RanksOptions(group.group_name, options["route"], backend, BackwardOptions(for_student, for_target, plan))
    return over_ranks(student, target, weights, ranks, backend)[:4]
