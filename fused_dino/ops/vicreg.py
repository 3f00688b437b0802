"""VICReg: the autograd.Function over its closed form (vicreg_torch.py) and its kernels (vicreg_triton.py).

With xc = y - mean, s_j = sum_i xc_ij^2, sigma_j = sqrt(s_j / m + eps), m = N or N - 1, n = max(N - 1, 1), and
D = d^2 or d, the covariance comes from whichever product is smaller:

    rows, N < d:    P = sum_j x_j x_j^T / n  [N, N] but for the largest column p,   c_j = <x_p, x_j> / n
                    covariance = (|P|^2 - sum_j (s_j / n)^2 + 2 sum_j c_j^2) / D,   Z = P xc - xc s / n + x_p c
                    of p itself Z_p = P x_p
    columns:        P = xc^T xc / n  [d, d] without its diagonal,   covariance = |P|^2 / D,    Z = xc P

and with g_i, g_v, g_c the gradients of the three terms, the gradient of the student is

    (4 g_c / (D n)) Z - g_v [sigma_j < gamma] xc / (d m sigma_j) + (2 g_i / (N d)) (y - g)

The gradient of the centring vanishes, since the columns of xc sum to 0. By rows the columns' own squares are taken off
the product's, which would cancel where a single column dominates. So the one that deviates most is set apart: what the
second largest takes off is then little beside the covariance of the two, unless they have nothing in common.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.vicreg import vicreg_loss as formula
from .dispatch import is_batched, keep_signature
from .vicreg_plan import Plan, make_plan
from .vicreg_torch import vicreg_bwd_torch, vicreg_fwd_torch
from .vicreg_triton import vicreg_bwd, vicreg_fwd


def terms_by_formula(student: Tensor, teacher: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """The three terms in eager's way, which can be differentiated and batched as often as one likes."""
    _, *terms = formula(
        student, teacher, gamma=plan.gamma, eps=plan.eps, unbiased=plan.unbiased,
        cov_reduction="mean" if plan.divisor == student.shape[1] ** 2 else "sum_over_d",
        inv_weight=float(plan.invariance), var_weight=float(plan.variance), cov_weight=float(plan.covariance),
    )  # fmt: skip
    return tuple(terms)


@keep_signature
class VICRegFunction(torch.autograd.Function):
    """(student [N, D], teacher [N, D], plan, backend) -> the three terms [], then what it saves."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, plan: Plan, backend: str) -> tuple[Tensor, ...]:
        if backend == "triton":
            return vicreg_fwd(student, teacher, *plan)
        return vicreg_fwd_torch(student, teacher, plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, teacher, ctx.plan, ctx.backend = inputs
        ctx.save_for_backward(student, teacher, *output[3:])
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
        student, teacher, shift, squares, product, largest, cross = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        outer = grads[0], grads[1], grads[2]
        given = [x for x in outer if x is not None]
        if not given:
            return None, None, None, None
        if torch.is_grad_enabled() or any(map(is_batched, given)):  # create_graph=True, or under vmap
            terms, vjp = torch.func.vjp(partial(terms_by_formula, plan=ctx.plan), student, teacher)[:2]
            made: tuple = vjp(tuple(torch.zeros_like(x) if g is None else g for g, x in zip(outer, terms, strict=True)))
        elif ctx.backend == "triton":
            made = vicreg_bwd(student, teacher, shift, squares, product, largest, cross, *outer, *wanted, *ctx.plan)
        else:
            made = vicreg_bwd_torch(
                student, teacher, shift, squares, product, largest, cross, *outer, *wanted, ctx.plan
            )
        for_student, for_teacher = (g if want else None for g, want in zip(made, wanted, strict=True))
        return for_student, for_teacher, None, None  # student, teacher, plan, backend

    @staticmethod
    def vmap(info: Any, in_dims: tuple, student: Tensor, teacher: Tensor, plan: Plan, backend: str) -> tuple:
        """Batch by batch: the products have no use for one another."""
        batches = zip(
            *(
                [x] * info.batch_size if dim is None else x.unbind(dim)
                for x, dim in zip((student, teacher), in_dims, strict=False)
            ),
            strict=True,
        )
        made = [VICRegFunction.apply(*pair, plan, backend) for pair in batches]
        stacked = tuple(map(torch.stack, zip(*made, strict=True)))
        return stacked, (0,) * len(stacked)


def vicreg_loss(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    *,
    inv_weight: float | Tensor,
    var_weight: float | Tensor,
    cov_weight: float | Tensor,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights: dict[str, Any] = {"inv_weight": inv_weight, "var_weight": var_weight, "cov_weight": cov_weight}
    plan = make_plan(student.shape[0], student.shape[1], **weights, **options)
    invariance, variance, covariance, *_ = VICRegFunction.apply(student, teacher, plan, backend)
    loss = inv_weight * invariance + var_weight * variance + cov_weight * covariance
    return loss, invariance, variance, covariance
