"""What of VICReg is computed, and by which product: decided from shapes and options, never from values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..reference.vicreg import covariance_divisor


class Plan(NamedTuple):
    """The options of one call, in the order in which the dispatcher's ops take them."""

    gamma: float
    eps: float
    unbiased: bool
    divisor: int  # of the sum of squared covariances
    gram: bool  # by the [N, N] product of rows, and not by the [D, D] one of columns
    inv_weight: float  # 0 where the term is not computed; a tensor may stand in for the others
    var_weight: float
    cov_weight: float

    @property
    def invariance(self) -> bool:
        return self.inv_weight != 0

    @property
    def variance(self) -> bool:
        return self.var_weight != 0

    @property
    def covariance(self) -> bool:
        return self.cov_weight != 0


# The same as a dispatcher's schema.
PLAN = (
    "float gamma, float eps, bool unbiased, int divisor, bool gram, float inv_weight, float var_weight, "
    "float cov_weight"
)


def make_plan(
    rows: int, width: int, /, *, inv_weight: float | Tensor, var_weight: float | Tensor, cov_weight: float | Tensor,
    gamma: float, eps: float, cov_reduction: str, unbiased: bool, route: str,
) -> Plan:  # fmt: skip
    """One column has nothing off the diagonal: its covariance is 0 without a product."""
    return Plan(
        gamma,
        eps,
        unbiased,
        covariance_divisor(width, cov_reduction),
        rows < width if route == "auto" else route == "gram",
        number(inv_weight),
        number(var_weight),
        number(cov_weight) if width > 1 else 0.0,
    )


def number(weight: float | Tensor) -> float:
    return 1.0 if isinstance(weight, Tensor) else float(weight)


def weights_of(plan: Plan, weights: Tensor | None) -> tuple[float | Tensor, ...]:
    """The plan's numbers, or the tensor's; 0 where the term is not computed, so that nothing of it comes through."""
    numbers = plan.inv_weight, plan.var_weight, plan.cov_weight
    if weights is None:
        return numbers
    return tuple(x if computed else computed for computed, x in zip(numbers, weights.unbind(), strict=True))
