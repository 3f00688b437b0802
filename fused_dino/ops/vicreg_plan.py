"""Decides which terms of VICReg are computed and by which product: from shapes and options, never from values."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

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
    """One column has nothing off the diagonal: its covariance is 0 without a product."""
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
    """Replaces weights whose numbers are elsewhere by 1 or 0. A compiler makes no float of a comparison."""
    return {name: 1.0 if is_computed(weight) else 0.0 for name, weight in weights.items()}


def weights_of(plan: Plan, weights: Tensor | None) -> tuple[float | Tensor, ...]:
    """The plan's numbers, or the tensor's; 0 where the term is not computed, so that nothing of it comes through."""
    if weights is None:
        return plan.weights
    return tuple(x if computed else computed for computed, x in zip(plan.weights, weights.unbind(), strict=True))
