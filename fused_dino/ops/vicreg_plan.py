"""The parts that every way of computing VICReg shares. A plan of terms and product is made from shapes and options, and
never from values. The terms are made from sums over the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from ..reference.vicreg import covariance_divisor, is_computed


class Plan(NamedTuple):
    """The options of one call."""

    gamma: float
    eps: float
    unbiased: bool
    divisor: int  # of the sum of squared covariances
    gram: bool  # by the [N, N] product of rows, and not by the [D, D] one of columns
    inv_weight: float  # 0 where the term is not computed, 1 where a tensor of the three or the caller has the number
    var_weight: float
    cov_weight: float

    @property
    def weights(self) -> tuple[float, float, float]:
        return self.inv_weight, self.var_weight, self.cov_weight

    @property
    def invariance(self) -> bool:
        return self.inv_weight != 0

    @property
    def variance(self) -> bool:
        return self.var_weight != 0

    @property
    def covariance(self) -> bool:
        return self.cov_weight != 0


def make_plan(
    rows: int, width: int, /, *, inv_weight: float, var_weight: float, cov_weight: float, gamma: float, eps: float,
    cov_reduction: str, unbiased: bool, route: str,
) -> Plan:  # fmt: skip
    """Return the plan of a call. One column has nothing off the diagonal: its covariance is 0 without a product."""
    return Plan(
        gamma,
        eps,
        unbiased,
        covariance_divisor(width, cov_reduction),
        rows < width if route == "auto" else route == "gram",
        float(inv_weight),
        float(var_weight),
        float(cov_weight) if width > 1 else 0.0,
    )


def flags(weights: dict[str, Any]) -> dict[str, Any]:
    """Return 1 or 0 for each weight, if a tensor has their numbers. A compiler makes no float of a comparison."""
    return {name: 1.0 if is_computed(weight) else 0.0 for name, weight in weights.items()}


def make_call(
    student: Tensor, target: Tensor, opaque: bool, *, inv_weight: Any, var_weight: Any, cov_weight: Any, **options: Any
) -> tuple[Tensor | None, Plan]:
    """Return the weights as a tensor [3], or None where the plan has their numbers, and the plan.

    opaque: whether an opaque op takes them.
    """
    weights = {"inv_weight": inv_weight, "var_weight": var_weight, "cov_weight": cov_weight}
    dtype, tensor = acc_dtype(student, target), None
    # Triton rounds a number to float32, which a float64 loss must not. A compiler would compile an op that takes a
    # number anew for each; a product with one it does not.
    if any(isinstance(x, Tensor) for x in weights.values()) or (
        opaque and (dtype == torch.float64 or torch.compiler.is_compiling())
    ):
        one = student.new_ones((), dtype=dtype)
        each = (x if isinstance(x, Tensor) else one * x for x in weights.values())
        tensor = torch.stack(list(each))
        weights = flags(weights)
    return tensor, make_plan(*student.shape, **weights, **options)


def weights_of(plan: Plan, weights: Tensor | None) -> tuple[float | Tensor, ...]:
    """Return the weights of the plan or of the tensor. A term that is not computed has 0, so that it adds nothing."""
    if weights is None:
        return plan.weights
    return tuple(x if computed else computed for computed, x in zip(plan.weights, weights.unbind(), strict=True))


Terms = tuple[Tensor, Tensor, Tensor, Tensor]  # the loss and its three terms []
Grads = tuple[Tensor, Tensor]  # of student and target, empty where not wanted


class BackwardOptions(NamedTuple):
    """The plan, and which gradients are computed."""

    for_student: bool
    for_target: bool
    plan: Plan


def empty_terms(student: Tensor, dtype: torch.dtype) -> Terms:
    loss, invariance, variance, covariance = (student.new_empty((), dtype=dtype) for _ in range(4))
    return loss, invariance, variance, covariance


def empty_grads(student: Tensor, target: Tensor, options: BackwardOptions, dtype: torch.dtype | None = None) -> Grads:
    """Allocate contiguous gradients of student and target, empty if not needed. dtype: None for that of the inputs."""
    for_student = student.new_empty(student.shape if options.for_student else 0, dtype=dtype)
    return for_student, target.new_empty(target.shape if options.for_target else 0, dtype=dtype)


def dof_of(rows: Any) -> Any:
    """Return N - 1, and at least 1, for a number or a tensor []."""
    return (rows - 1).clamp(min=1) if isinstance(rows, Tensor) else max(rows - 1, 1)


def deviation(squares: Tensor, rows: Any, plan: Plan) -> Tensor:
    """Return sigma [D], which is NaN without rows."""
    over = rows
    if plan.unbiased:
        over = torch.where(rows == 0, rows, dof_of(rows)) if isinstance(rows, Tensor) else rows and dof_of(rows)
    return (squares / over + plan.eps).sqrt()


def terms_of(
    error: Tensor, rows: Any, squares: Tensor, total: Tensor, width: int, weights: Tensor | None, plan: Plan
) -> Terms:
    """Return the loss and its three terms [], of the sums of squared errors and of squared covariances.

    squares: of the centred columns, [D]; empty where neither variance nor covariance is computed.
    """
    zero = squares.new_zeros(())
    invariance = (error / (rows * width)).to(zero) if plan.invariance else zero.clone()
    variance = torch.relu(plan.gamma - deviation(squares, rows, plan)).mean() if plan.variance else zero.clone()
    covariance = (total / plan.divisor).to(zero) if plan.covariance else zero.clone()
    inv_weight, var_weight, cov_weight = weights_of(plan, weights)
    loss = inv_weight * invariance + var_weight * variance + cov_weight * covariance
    return loss, invariance, variance, covariance
