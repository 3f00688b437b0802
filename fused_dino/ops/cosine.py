"""Cosine and squared error between rows: the choice of the backend, and the autograd.Function.

With s = student / max(|student|, eps), t likewise:

    cosine   value = 1 - <s, t>     d value / d student = (<s, t> s - t) / |student|
    mse      value = |s - t|^2      d value / d student = 2 (<s, t> s - t) / |student|
    raw      value = |s - t|^2 of the rows as they are, or as standardize.py makes them

where a norm is clamped it is a constant, and the gradient loses its part along s.

The forward writes the student's gradient for a grad_output of 1, with weight and alpha in it, where it is wanted. The
first backward scales it in place and gives it away; later ones read the rows again, as does whatever
`stores_gradient` turns down.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.cosine import NORM_EPS, cosine_distance, prepared
from ..reference.dtypes import wide
from .cosine_torch import cosine_rows_torch
from .cosine_triton import cosine_rescale_, cosine_rows
from .dispatch import batched_rows, is_batched, keep_signature
from .standardize import standardize


def formula(
    student: Tensor, teacher: Tensor, weight: Tensor | None, alpha: Tensor | None, kind: str, reduction: str,
    count: int, eps: float,
) -> Tensor:  # fmt: skip
    """The loss by the reference's formulas, for whoever differentiates the gradient."""
    if kind == "cosine":
        values = cosine_distance(student, teacher, eps)
    else:
        s, t = prepared(student, teacher, normalize=kind == "mse", whiten=None)
        values = (s - t).square() if reduction == "elements" else (s - t).square().sum(-1)
    for factor in (weight if weight is None or values.ndim == 1 else weight.unsqueeze(-1), alpha):
        values = values if factor is None else values * factor
    return (values.sum() if reduction == "sum" else values) / count


@keep_signature
class CosineFunction(torch.autograd.Function):
    """(student [N, D], teacher [N, D], weight [N], alpha [], kind, reduction, count, eps, backend, store)
    -> (loss; it without alpha; the stored gradient), the last for itself."""

    @staticmethod
    def forward(
        student: Tensor, teacher: Tensor, weight: Tensor | None, alpha: Tensor | None, kind: str, reduction: str,
        count: int, eps: float, backend: str, store: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        run = cosine_rows if backend == "triton" else cosine_rows_torch
        return run(student, teacher, weight, alpha, None, kind, reduction, count, eps, store, False)[:3]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, teacher, weight, alpha, *how, ctx.backend, ctx.stored = inputs
        ctx.how = tuple(how)
        ctx.save_for_backward(student, teacher, weight, alpha, output[2])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        student, teacher, weight, alpha, stored = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        nothing = (None,) * 8  # weight, alpha, kind, reduction, count, eps, backend, store
        if grad is None:
            return None, None, *nothing
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True, or under vmap: the formula serves both
            loss = partial(formula, weight=weight, alpha=alpha, **dict(zip(HOW, ctx.how, strict=True)))
            grads = torch.func.vjp(loss, student, teacher)[1](grad)
        elif ctx.stored and not wanted[1] and not torch.compiler.is_compiling():
            ctx.stored = False  # given away for good: it may become p.grad, and anyone may change it
            given = stored.data  # the same memory, with its own version counter and reference count
            rescale(given, grad, ctx.backend)
            return given, None, *nothing
        else:
            run = cosine_rows if ctx.backend == "triton" else cosine_rows_torch
            grad = grad.expand(student.shape[0]) if grad.ndim == 0 else grad
            grads = run(student, teacher, weight, alpha, grad, *ctx.how, *wanted)[2:]
        for_student, for_teacher = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return for_student, for_teacher, *nothing

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, student: Tensor, teacher: Tensor, weight: Tensor | None, alpha: Tensor | None,
        kind: str, reduction: str, count: int, eps: float, backend: str, store: bool,
    ) -> tuple:  # fmt: skip
        batch = info.batch_size
        rows = batched_rows(batch, in_dims[:3], student, teacher, weight)
        each = "elements" if reduction == "elements" else "rows"
        values = CosineFunction.apply(*rows, None, kind, each, count, eps, backend, False)[0]
        values = values.unflatten(0, (batch, values.shape[0] // batch))
        value = values.sum(1) if reduction == "sum" else values
        loss = value
        if alpha is not None:
            loss = value * (alpha if in_dims[3] is None else alpha.view(batch, *(1 for _ in value.shape[1:])))
        return (loss, value, value.new_empty(0)), (0, 0, None)


HOW = ("kind", "reduction", "count", "eps")


def rescale(grad: Tensor, grad_output: Tensor, backend: str) -> None:
    if backend == "triton":
        cosine_rescale_(grad, grad_output)
    elif grad.device.type != "cpu" or type(grad_output) is not Tensor or grad_output != 1:
        grad.mul_(grad_output)  # a CPU may look at a value, if there is one, and spare itself the pass


def stores_gradient(student: Tensor, teacher: Tensor, reduction: str) -> bool:
    """Whether the forward writes the gradient, from what the host knows. A hint: the backward is right either way."""
    return (
        torch.is_grad_enabled()
        and student.requires_grad
        and not teacher.requires_grad
        and reduction == "sum"  # else grad_output is no scalar
        and student.dtype != torch.float16  # 1/N underflows before the factor of a GradScaler arrives
        and not torch.compiler.is_compiling()  # inductor would copy what the backward scales in place
    )


def rows_loss(
    student: Tensor,  # [..., D]
    teacher: Tensor,  # [..., D]
    *,
    kind: str,
    weight: Tensor | None,  # [...]
    alpha: Tensor | None,  # []
    reduction: str,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss, the loss without alpha and without a gradient)."""
    leading, width = student.shape[:-1], student.shape[-1]
    student, teacher = (x.reshape(-1, width) for x in (student, teacher))
    elements = kind != "cosine" and reduction == "none"
    count = 1
    if reduction == "mean":
        count = (1 if kind == "cosine" else width) * (1 if weight is not None else student.shape[0])
    if weight is not None:
        weight = weight.to(wide(student, teacher)).expand(leading).reshape(-1)
        if reduction == "mean":
            total = weight.sum()
            weight = weight / torch.where(total == 0, 1, total)
    how = (kind, {"none": "elements" if elements else "rows"}.get(reduction, "sum"), count, eps)
    store = stores_gradient(student, teacher, how[1])
    loss, value, _ = CosineFunction.apply(student, teacher, weight, alpha, *how, backend, store)
    value = loss.detach() if alpha is None else value
    return (loss, value) if reduction != "none" else (loss.reshape((*leading, *loss.shape[1:])), value)


def cosine_loss(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return rows_loss(student, teacher, kind="cosine", **options)


def mse_loss(
    student: Tensor, teacher: Tensor, *, normalize: bool, whiten: bool, eps: float, **options: Any
) -> tuple[Tensor, Tensor]:
    if not whiten:
        return rows_loss(student, teacher, kind="mse" if normalize else "raw", eps=NORM_EPS, **options)
    dtype, width = wide(student, teacher), student.shape[-1]
    s, t = (
        standardize(x.reshape(-1, width), normalize, eps, dtype, options["backend"]).reshape(x.shape)
        for x in (student, teacher)
    )
    return rows_loss(s, t, kind="raw", eps=NORM_EPS, **options)
