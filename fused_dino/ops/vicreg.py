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

from ..reference.dtypes import wide
from ..reference.vicreg import vicreg_loss as formula
from .dispatch import is_batched, keep_signature
from .vicreg_plan import Plan, flags, make_plan, weights_of
from .vicreg_torch import vicreg_bwd_torch, vicreg_fwd_torch
from .vicreg_triton import vicreg_bwd, vicreg_fwd

Weights = Tensor | None  # of the three terms, [3]; None: the plan's numbers


def loss_by_formula(student: Tensor, teacher: Tensor, weights: Weights, plan: Plan) -> Tensor:
    """The loss in eager's way, which can be differentiated and batched as often as one likes."""
    inv_weight, var_weight, cov_weight = weights_of(plan, weights)
    return formula(
        student, teacher, gamma=plan.gamma, eps=plan.eps, unbiased=plan.unbiased,
        cov_reduction="mean" if plan.divisor == student.shape[1] ** 2 else "sum_over_d",
        inv_weight=inv_weight, var_weight=var_weight, cov_weight=cov_weight,
    )[0]  # fmt: skip


def gradient_by_formula(
    student: Tensor, teacher: Tensor, grad: Tensor, weights: Weights, plan: Plan
) -> tuple[Tensor, Tensor]:
    return torch.func.vjp(partial(loss_by_formula, weights=weights, plan=plan), student, teacher)[1](grad)


class VICRegGradient(torch.autograd.Function):
    """(student, teacher, what VICRegFunction saved, grad [], weights, wanted, plan, backend) -> the two gradients,
    empty where not wanted. Its own gradient, the loss's second, is eager's."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, kept: tuple[Any, ...], grad: Tensor, weights: Weights,
        wanted: tuple[bool, bool], plan: Plan, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        run = vicreg_bwd if backend == "triton" else vicreg_bwd_torch
        return run(student, teacher, *kept, grad, weights, *wanted, *plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, teacher, _, grad, weights, _, ctx.plan, _ = inputs
        ctx.save_for_backward(student, teacher, grad, weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        gradient = partial(gradient_by_formula, weights=weights, plan=ctx.plan)
        made, vjp = torch.func.vjp(gradient, *inputs)[:2]
        given = tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, made, strict=True))
        for_student, for_teacher, for_grad = vjp(given)
        return for_student, for_teacher, None, for_grad, None, None, None, None


@keep_signature
class VICRegFunction(torch.autograd.Function):
    """(student [N, D], teacher [N, D], weights, plan, backend) -> the loss and its terms [], then what it saves. The
    loss alone has a gradient, and the student and the teacher alone get one."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, weights: Weights, plan: Plan, backend: str) -> tuple[Tensor, ...]:
        run = vicreg_fwd if backend == "triton" else vicreg_fwd_torch
        return run(student, teacher, weights, *plan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, teacher, weights, ctx.plan, ctx.backend = inputs
        ctx.save_for_backward(student, teacher, weights, *output[4:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        student, teacher, weights, *kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if is_batched(grad):
            made = gradient_by_formula(student, teacher, grad, weights, ctx.plan)
        else:
            gradient = VICRegGradient.apply if torch.is_grad_enabled() else VICRegGradient.forward
            made = gradient(student, teacher, tuple(kept), grad, weights, wanted, ctx.plan, ctx.backend)
        for_student, for_teacher = (g if want else None for g, want in zip(made, wanted, strict=True))
        return for_student, for_teacher, None, None, None  # weights, plan, backend

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, student: Tensor, teacher: Tensor, weights: Weights, plan: Plan, backend: str
    ) -> tuple:
        """Batch by batch: the products have no use for one another."""
        inputs: tuple[Any, ...] = (student, teacher, weights)
        parts = (
            [x] * info.batch_size if dim is None else x.unbind(dim) for x, dim in zip(inputs, in_dims[:3], strict=True)
        )
        batches = zip(*parts, strict=True)
        made = [VICRegFunction.apply(*batch, plan, backend) for batch in batches]
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
) -> tuple[Tensor, ...]:
    """The loss and its three terms."""
    weights: dict[str, Any] = {"inv_weight": inv_weight, "var_weight": var_weight, "cov_weight": cov_weight}
    dtype, tensor = wide(student, teacher), None
    # Triton rounds a number to float32, which a float64 loss must not. A compiler would compile an op that takes a
    # number anew for each; a product with one it does not.
    if any(isinstance(x, Tensor) for x in weights.values()) or (
        backend == "triton" and (dtype == torch.float64 or torch.compiler.is_compiling())
    ):
        one = student.new_ones((), dtype=dtype)
        each = (x if isinstance(x, Tensor) else one * x for x in weights.values())
        tensor = torch.stack(list(each))
        weights = flags(weights)
    plan = make_plan(*student.shape, **weights, **options)
    return VICRegFunction.apply(student, teacher, tensor, plan, backend)[:4]
