"""VICReg's calls: the checks of its arguments, and one branch, both branches or positions as calls of its op."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import distributed
from .backend import choose
from .reference.dtypes import acc_dtype
from .validation import (
    check_choice,
    check_flag,
    check_floating,
    check_group,
    check_matching,
    check_number,
    check_scalar,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WEIGHTS = ("inv_weight", "var_weight", "cov_weight")
Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def vicreg_terms(
    student: Any, target: Any, *, both: Any, per: Any, route: Any, group: Any, backend: str | None, **options: Any
) -> Terms:
    """Return the loss and its three terms, of which the loss alone carries a gradient."""
    check_branches(student, target, check_flag("both", both))
    check_choice("per", per, ("batch", "position"))
    check_choice("route", route, ("auto", "gram", "covariance"))
    check_group(group)
    if group is not None and group.size() == 1:
        group = None
    dtype = acc_dtype(*(x for x in (student, target) if x is not None))
    options = check_options(student.device, dtype, **options)
    if target is None:
        target, options["inv_weight"] = student.detach(), 0.0
    if student.ndim == 3 and per == "batch":
        student, target = student.flatten(0, 1), target.flatten(0, 1)
    if student.shape[0] == 1 and group is None and not torch.compiler.is_compiling():
        warnings.warn("vicreg_loss got one row: its variance and covariance are 0 by convention", stacklevel=3)
    op = chosen_op(student, route, group, backend)
    positions = [(student, target)]
    if student.ndim == 3:
        positions = list(zip(student.unbind(1), target.unbind(1), strict=True))
    terms = mean([of_branches(op, s, t, both, options) for s, t in positions])
    return (terms[0], *(x.detach() for x in terms[1:]))  # type: ignore[return-value]


def of_branches(
    op: Callable[..., Terms], student: Tensor, target: Tensor, both: bool, options: dict[str, Any]
) -> Terms:
    """Run the op on the student, and on the target too where both are regularised: their terms add up."""
    terms = op(student, target, **options)
    if not both:
        return terms
    if acc_dtype(student, target) == torch.float64:
        target = target.double()  # by itself it would be computed in its own dtype
    others = op(target, target.detach(), **{**options, "inv_weight": 0.0})
    loss, variance, covariance = (terms[i] + others[i] for i in (0, 2, 3))
    return loss, terms[1], variance, covariance


def mean(each: list[Terms]) -> Terms:
    if len(each) == 1:
        return each[0]
    return tuple(torch.stack(values).mean(0) for values in zip(*each, strict=True))  # type: ignore[return-value]


def chosen_op(student: Tensor, route: str, group: ProcessGroup | None, backend: str | None) -> Callable[..., Terms]:
    """Choose the implementation, and give it what it alone takes."""
    name, implementation = choose("vicreg_loss" if group is None else "vicreg_loss(group)", student, backend)
    if name == "reference":
        return partial(implementation, total=partial(distributed.sum_over_ranks, group=group))
    return partial(implementation, route=route, **({} if group is None else {"group": group}))


def check_branches(student: Any, target: Any, both: bool) -> None:
    """Check two branches of one shape, or a student alone."""
    if target is None:
        if both:
            raise ValueError("target is None, and both=True regularises it; give both branches")
        check_floating("student", student)
    else:
        check_matching(student, target)
    if student.ndim not in (2, 3) or student.shape[-1] < 1:
        raise ValueError(f"student must be [N, D] or [B, N, D] with D of at least 1, got shape {list(student.shape)}")
    if student.ndim == 3 and student.shape[1] < 1:
        raise ValueError(f"student must be [B, N, D] with N of at least 1, got shape {list(student.shape)}")


def check_options(
    device: torch.device, dtype: torch.dtype, *, gamma: Any, eps: Any, cov_reduction: Any, unbiased: Any, **weights: Any
) -> dict[str, Any]:
    options: dict[str, Any] = {name: check_scalar(name, weights[name], device) for name in WEIGHTS}
    options = {name: x.to(dtype) if isinstance(x, Tensor) else x for name, x in options.items()}
    options["gamma"] = check_number("gamma", gamma)
    options["eps"] = check_number("eps", eps, minimum=0)
    options["cov_reduction"] = check_choice("cov_reduction", cov_reduction, ("mean", "sum_over_d"))
    options["unbiased"] = check_flag("unbiased", unbiased)
    return options
