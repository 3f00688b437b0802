"""VICReg: the autograd.Function over its closed form and its kernels, the formulas, and the file that computes each
part.

With xc = y - mean, s_j = sum_i xc_ij^2, sigma_j = sqrt(s_j / m + eps), m = N or N - 1, n = max(N - 1, 1), and
D = d^2 or d, the covariance comes from whichever product is smaller:

    gram:        P = sum_j x_j x_j^T / n  [N, N] but for the largest column p,   c_j = <x_p, x_j> / n
                 covariance = (|P|^2 - sum_j (s_j / n)^2 + 2 sum_j c_j^2) / D,   Z = P xc - xc s / n + x_p c
                 of p itself Z_p = P x_p
    covariance:  P = xc^T xc / n  [d, d] without its diagonal,   covariance = |P|^2 / D,    Z = xc P

and with g_i, g_v, g_c the gradients of the three terms, the gradient of the student is

    (4 g_c / (D n)) Z - g_v [sigma_j < gamma] xc / (d m sigma_j) + (2 g_i / (N d)) (y - g)

The gradient of the centring vanishes, since the columns of xc sum to 0. The Gram route subtracts the columns' squares
from those of the product. The two would cancel where a single column dominates, so the column that deviates most is
left out. What is subtracted for the second largest is then small beside the covariance of the two, unless they are
uncorrelated. A better sum does not help. For [64, 256] with a column a million times the others, leaving it out has an
error of 5e-8. Subtracting it has an error of 2e-4 from a float32 product in float64, and of 7e-5 from a float64
product; a float32 difference has no right digit.

If students of 16 bits are multiplied as they are, the part of the means is subtracted from y y^T and y^T y afterwards:

    gram, none left out:    n P = y y^T - r 1^T - 1 r^T + |mean|^2,    r = the mean of each row of y y^T
    covariance:             n P = y^T y - N mean mean^T,               xc P = y P - 1 (mean^T P)

P is saved for the backward as planes, which are 16-bit numbers that sum to it: two planes if rows are multiplied as
they are. The gradient multiplies the first plane alone if the second is below the rounding of the gradient, whatever
the student is (is_first_plane_enough). With the weights 25, 10 and 0.5 this holds while the errors are not small. For
the covariance alone norms cannot prove it: random rows would lose half a rounding, but [256, 258] orthogonal rows would
lose six.

Each route in one process, and over the ranks of a group, where rank r has N_r rows:

                  one process                          the ranks of a group (vicreg_ranks.py)
    gram          half of P, and its mirror image      all rows are gathered; own rows of P; sums of squares are added
    covariance    half of P, and its mirror image      P about own means, then about those of all; P is added
    torch         vicreg_torch.py                      the same functions, which ask a Ranks (vicreg_exchange.py)
    triton        vicreg_triton.py: four launches      vicreg_ranks_triton.py: the same ones, collectives between them
    terms         torch: terms_of; triton: its last    terms_of (vicreg_plan.py)
                  program (store_terms)
    gradient      in the backward, by a launch or      with the loss, by the same launch or function
                  function of its own
    its own       by the formula of eager              refused

Both branches and positions are calls of either (fused_dino/vicreg.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.vicreg import vicreg_loss as formula
from . import vicreg_torch, vicreg_triton
from .function import make_function
from .vicreg_plan import BackwardOptions, Plan, make_call, weights_of


def loss_by_formula(student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan) -> Tensor:
    """Return the loss and its terms by eager formulas. weights: those of the terms, [3]; None: the plan's numbers."""
    inv_weight, var_weight, cov_weight = weights_of(plan, weights)
    return formula(
        student, target, gamma=plan.gamma, eps=plan.eps, unbiased=plan.unbiased,
        cov_reduction="mean" if plan.divisor == student.shape[1] ** 2 else "sum_over_d",
        inv_weight=inv_weight, var_weight=var_weight, cov_weight=cov_weight,
    )[0]  # fmt: skip


def gradient_by_formula(
    student: Tensor, target: Tensor, grad: Tensor, weights: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    """Return the gradients by eager formulas. others: what the forward saved, and the options."""
    loss = partial(loss_by_formula, weights=weights, plan=others[-1].plan)
    return torch.func.vjp(loss, student, target)[1](grad)


def gradient(
    student: Tensor, target: Tensor, grad: Tensor, weights: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor]:
    """Return both gradients, empty if not needed. others: what the forward saved, options, backend."""
    *saved, options, backend = others
    if backend == "triton":
        return vicreg_triton.vicreg_bwd(student, target, grad, weights, vicreg_triton.Saved(*saved), options)
    return vicreg_torch.vicreg_bwd_torch(student, target, grad, weights, vicreg_torch.Saved(*saved), options)


# Its own gradient, the loss's second, is eager's.
gradient_function = make_function("VICRegGradient", gradient, None, gradient_by_formula, inputs=3, outputs=2, saved=2)


def forward(student: Tensor, target: Tensor, weights: Tensor | None, plan: Plan, backend: str) -> tuple[Tensor, ...]:
    """Return the loss and its terms [], then what the backward needs."""
    return (vicreg_triton.vicreg_fwd if backend == "triton" else vicreg_torch.vicreg_fwd_torch)(
        student, target, weights, plan
    )


def backward(ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor], needs_grad: tuple[bool, bool]) -> tuple:
    student, target, weights, *statistics = saved
    options = BackwardOptions(*needs_grad, ctx.options)
    run = gradient_function if torch.is_grad_enabled() else gradient
    return run(student, target, *grads, weights, *statistics, options, ctx.backend)


vicreg_function = make_function(
    "VICRegFunction", forward, backward, loss_by_formula, inputs=2, saved=4, twice=True
)  # fmt: skip


def vicreg_loss(
    student: Tensor,  # [N, D]
    target: Tensor,  # [N, D]
    *,
    backend: str,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Return the loss and its three terms."""
    weights, plan = make_call(student, target, backend == "triton", **options)
    return vicreg_function(student, target, weights, plan, backend)[:4]
