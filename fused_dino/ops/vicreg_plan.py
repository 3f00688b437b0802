"""What of VICReg is computed, and by which product: decided from shapes and options, never from values."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..reference.vicreg import covariance_divisor, wanted


class Plan(NamedTuple):
    """The options of one call, in the order in which the dispatcher's ops take them."""

    gamma: float
    eps: float
    unbiased: bool
    divisor: int  # of the sum of squared covariances
    gram: bool  # by the [N, N] product of rows, and not by the [D, D] one of columns
    invariance: bool  # which terms are computed; the others are 0
    variance: bool
    covariance: bool


# The same as a dispatcher's schema.
PLAN = "float gamma, float eps, bool unbiased, int divisor, bool gram, bool invariance, bool variance, bool covariance"


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
        wanted(inv_weight),
        wanted(var_weight),
        wanted(cov_weight) and width > 1,
    )
