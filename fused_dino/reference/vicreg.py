"""VICReg of a frozen target: the invariance, and the variance and covariance of the student."""

from collections.abc import Callable

import torch
from torch import Tensor

from .dtypes import scaled, upcast, without_autocast


def vicreg_loss(
    student: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    *,
    inv_weight: float | Tensor,
    var_weight: float | Tensor,
    cov_weight: float | Tensor,
    gamma: float,
    eps: float,
    cov_reduction: str,
    unbiased: bool,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and its three terms, over the rows of all processes that `total` sums over.

    invariance = mean((y - g)^2)
    variance   = mean_j relu(gamma - sqrt(var_j + eps)),  var_j over N rows, or over N - 1 if unbiased
    covariance = sum_{i != j} c_ij^2 / D^2 ("mean") or / D ("sum_over_d"),  c = yc^T yc / (N - 1)

    One row has deviations of 0: N - 1 is at least 1. A term whose weight is the number 0 is left out: it is 0.
    """
    y, g = upcast(student, target)
    n, d = total(y.new_full((), y.shape[0])), y.shape[1]
    dof = (n - 1).clamp(min=1)
    invariance = variance = covariance = y[:0].sum() + g[:0].sum()  # 0, with a gradient of zeros

    if is_computed(inv_weight):
        invariance = total((y - g).square().sum()) / (n * d)

    yc = y - total(y.sum(0)) / n
    if is_computed(var_weight):
        divisor = torch.where(n == 0, n, dof) if unbiased else n
        deviation = (total(yc.square().sum(0)) / divisor + eps).sqrt()
        variance = torch.relu(gamma - deviation).mean()

    if is_computed(cov_weight):
        with without_autocast(y):
            c = total(yc.T @ yc) / dof
        off_diagonal = c - torch.diag(torch.diag(c))
        covariance = off_diagonal.square().sum() / covariance_divisor(d, cov_reduction)

    loss = scaled(invariance, inv_weight) + scaled(variance, var_weight) + scaled(covariance, cov_weight)
    return loss, invariance, variance, covariance


def is_computed(weight: float | Tensor) -> bool:
    """Whether a term is computed. A tensor counts as yes, since reading its value would wait for the device."""
    return isinstance(weight, Tensor) or weight != 0


def covariance_divisor(width: int, cov_reduction: str) -> int:
    """Return what the sum of squared covariances is divided by."""
    return width * width if cov_reduction == "mean" else width
