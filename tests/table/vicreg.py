"""vicreg_loss."""

import torch
from torch import Tensor

from fused_dino import functional as FD
from fused_dino.ops import vicreg_triton
from fused_dino.ops.vicreg_plan import make_plan
from proving import Case, Op


def vicreg_scales(
    student: Tensor, target: Tensor, grad_output: Tensor, *, inv_weight: float = 25.0, var_weight: float = 10.0,
    cov_weight: float = 0.5, gamma: float = 1.0, eps: float = 1e-4, cov_reduction: str = "mean", unbiased: bool = False,
    route: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the units: sums of the terms without their signs.

    The covariance c_ij sums |x_ni x_nj|, and its gradient sums products of them with |x|. The diagonal, which eager
    leaves out, is no part of the unit. An x near 0 is a difference too, which is rounded as its column is.
    """
    y, t, grad = student.double(), target.double(), grad_output.double().abs()
    n, d = y.shape
    dof = max(n - 1, 1)
    count = dof if unbiased else n
    x = y - y.mean(0)
    c = (x.T @ x / dof).fill_diagonal_(0)
    unsigned = (x.abs().T @ x.abs() / dof).fill_diagonal_(0)
    deviation = x.abs() + x.square().mean(0).sqrt()
    sigma = (x.square().sum(0) / count + eps).sqrt()
    divisor = d * d if cov_reduction == "mean" else d
    value = inv_weight * (y - t).square().mean() + var_weight * (abs(gamma) + sigma.mean())
    value = value + cov_weight * (c.abs() * unsigned).sum() / divisor
    inv_grad = 2 * inv_weight / (n * d) * (y.abs() + t.abs())
    var_grad = var_weight / (d * count) * deviation / sigma
    cov_grad = 4 * cov_weight / (divisor * dof) * (deviation @ unsigned)
    smallest = torch.finfo(torch.float64).tiny  # where nothing is summed the result is 0, to the bit
    student_grad, target_grad = (x * grad for x in (inv_grad + var_grad + cov_grad, inv_grad))
    return value * grad, student_grad.clamp(smallest), target_grad.clamp(smallest)


def vicreg_plan(rows: int, width: int) -> tuple:
    return make_plan(
        rows, width, inv_weight=25.0, var_weight=10.0, cov_weight=0.5, gamma=1.0, eps=1e-4, cov_reduction="mean",
        unbiased=False, route="auto",
    )  # fmt: skip


def vicreg_backward_arguments(student: Tensor, target: Tensor, loss: Tensor, *outputs: Tensor) -> tuple:
    weights = torch.tensor((25.0, 10.0, 0.5), dtype=loss.dtype, device=student.device)
    _, _, _, *saved = outputs
    return (student, target, torch.ones_like(loss), weights, *saved, True, True, *vicreg_plan(*student.shape))


ALONE = {"inv_weight": 0.0, "var_weight": 0.0}  # so that the covariance cannot hide behind the other terms

VICREG = Op(
    "vicreg_loss",
    lambda student, target, **options: FD.vicreg_loss(student, target, **options).loss,
    (
        Case((16, 40), "fewer rows than columns: the product of rows"),
        Case((40, 16), "fewer columns: the product of columns"),
        Case((5, 37), "no power of two: masked tails"),
        Case((37, 5), "the same by columns"),
        Case((24, 24), "as many: by columns"),
        Case((23, 24), "one row less: by rows"),
        Case((25, 24), "one row more"),
        Case((6, 1), "one column, which has no covariance"),
        Case((2, 300), "two rows"),
        Case((70, 150), "more than one tile, off the diagonal too", ALONE),
        Case((150, 70), "the same by columns", ALONE),
        Case((70, 160), "rows in whole vectors, which 16 bits multiply as they are", ALONE),
        Case((160, 80), "the same by columns", ALONE),
        Case((20, 1100), "the product split over its depth", ALONE),
        Case((1100, 20), "the same by columns, and statistics of more than one run of rows"),
        Case((12, 30), "the other route", {"route": "covariance", **ALONE}),
        Case((30, 12), "the other route", {"route": "gram", **ALONE}),
        Case((12, 30), "as published", {"cov_reduction": "sum_over_d", "unbiased": True}),
        Case((30, 12), "as published, by columns", {"cov_reduction": "sum_over_d", "unbiased": True}),
        Case((9, 20), "every deviation below gamma", {"gamma": 5.0, "eps": 0.1, "inv_weight": 0.0, "cov_weight": 0.0}),
        Case((9, 20), "without the variance", {"var_weight": 0.0}),
    ),
    scales=vicreg_scales,
    more_sizes=((70, 90),),  # the product's mirror images
    poisoned=True,
    forward=vicreg_triton.vicreg_fwd.overload,
    backward=vicreg_triton.vicreg_bwd.overload,
    forward_arguments=lambda s, t: (s, t, None, *vicreg_plan(*s.shape)),
    backward_arguments=vicreg_backward_arguments,
)
