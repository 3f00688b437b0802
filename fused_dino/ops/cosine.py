"""Cosine between rows: closed form, Triton launcher, dispatcher op, autograd.Function.

distance_i = 1 - <s, t>,   s = student_i / max(|student_i|, eps),  t likewise
d distance_i / d student_i = (<s, t> s - t) / |student_i|,   without its first term where the norm is clamped
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.cosine import cosine_distance, reduce
from ..reference.dtypes import upcast, wide, without_autocast
from .dispatch import batched_rows, by_rows, define, is_batched, rows_of

# Columns that one program holds at a time, and its warps: the narrowest that takes a row at once, else the widest.
CONFIGURATIONS = {256: 1, 1024: 4, 4096: 8}


# --- closed form in plain torch ---------------------------------------------------------------------------------------


def unit(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Rows over their norms. Products are taken after it: the square of a large norm leaves the range."""
    return x * (1 / norm.clamp(min=eps)).unsqueeze(-1)


def forward_rows(student: Tensor, teacher: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    s, t = upcast(student, teacher)
    s_norm, t_norm = (torch.linalg.vecdot(x, x).sqrt() for x in (s, t))
    return 1 - torch.linalg.vecdot(unit(s, s_norm, eps), unit(t, t_norm, eps)), s_norm, t_norm


def backward_rows(
    x: Tensor, y: Tensor, distance: Tensor, x_norm: Tensor, y_norm: Tensor, grad: Tensor, *, eps: float
) -> tuple[Tensor]:
    """The gradient of x; the two inputs are alike."""
    x, y = upcast(x, y)
    along = torch.where(x_norm < eps, 0, 1 - distance).unsqueeze(-1)  # a clamped norm is a constant
    towards = (unit(x, x_norm, eps) * along).sub_(unit(y, y_norm, eps))
    return (towards.mul_((grad / x_norm.clamp(min=eps)).unsqueeze(-1)),)


def cosine_fwd_torch(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out = cosine_fwd_fake(student, teacher, eps)
    with without_autocast(student):  # to which vecdot is a matrix product
        return by_rows(partial(forward_rows, eps=eps), out, student, teacher)


def cosine_bwd_torch(
    student: Tensor, teacher: Tensor, distance: Tensor, s_norm: Tensor, t_norm: Tensor, grad: Tensor, eps: float,
    for_student: bool, for_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    for_s, for_t = cosine_bwd_fake(student, teacher, distance, s_norm, t_norm, grad, eps, for_student, for_teacher)
    run = partial(backward_rows, eps=eps)
    if for_student:
        (for_s,) = by_rows(run, (for_s,), student, teacher, distance, s_norm, t_norm, grad)
    if for_teacher:
        (for_t,) = by_rows(run, (for_t,), teacher, student, distance, t_norm, s_norm, grad)
    return for_s, for_t


# --- Triton -----------------------------------------------------------------------------------------------------------


def cosine_fwd_fake(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the forward returns, not filled: distance, |student| and |teacher|, [N] each."""
    distance, s_norm, t_norm = (student.new_empty(student.shape[0], dtype=wide(student, teacher)) for _ in range(3))
    return distance, s_norm, t_norm


def cosine_bwd_fake(
    student: Tensor, teacher: Tensor, distance: Tensor, s_norm: Tensor, t_norm: Tensor, grad: Tensor, eps: float,
    for_student: bool, for_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the backward returns, not filled: the gradients, each [N, D] and contiguous, or empty where not wanted."""
    for_s = student.new_empty(student.shape if for_student else 0)
    for_t = teacher.new_empty(teacher.shape if for_teacher else 0)
    return for_s, for_t


def launch_options(distance: Tensor, width: int, eps: float) -> dict[str, Any]:
    """eps is compiled in: as an argument Triton would round it to float32, for float64 too.

    Multiplications and additions may be fused, explicitly: it rounds once less, and Triton 3.10 changes the default.
    """
    import triton.language as tl

    block = next((block for block in CONFIGURATIONS if block >= width), max(CONFIGURATIONS))
    wide = tl.float64 if distance.dtype == torch.float64 else tl.float32
    compiling = {"num_warps": CONFIGURATIONS[block], "enable_fp_fusion": True}
    return {"EPS": eps, "BLOCK": block, "ACC": wide, **compiling}


def cosine_fwd_triton(student: Tensor, teacher: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.cosine import cosine_fwd_kernel

    student, teacher = rows_of(student, teacher)
    distance, s_norm, t_norm = cosine_fwd_fake(student, teacher, eps)
    if len(student):
        with torch.cuda.device_of(student):  # the tensor's GPU need not be the current one; no-op on a CPU
            cosine_fwd_kernel[(len(student),)](
                student, teacher, distance, s_norm, t_norm, student.stride(0), teacher.stride(0), student.shape[1],
                **launch_options(distance, student.shape[1], eps),
            )  # fmt: skip
    return distance, s_norm, t_norm


def cosine_bwd_triton(
    student: Tensor, teacher: Tensor, distance: Tensor, s_norm: Tensor, t_norm: Tensor, grad: Tensor, eps: float,
    for_student: bool, for_teacher: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from ..kernels.cosine import cosine_bwd_kernel

    student, teacher = rows_of(student, teacher)
    grads = cosine_bwd_fake(student, teacher, distance, s_norm, t_norm, grad, eps, for_student, for_teacher)
    if len(student):
        with torch.cuda.device_of(student):
            cosine_bwd_kernel[(len(student),)](
                student, teacher, distance, s_norm, t_norm, grad,
                grads[0] if for_student else None, grads[1] if for_teacher else None,
                student.stride(0), teacher.stride(0), grad.stride(0), student.shape[1],
                **launch_options(distance, student.shape[1], eps),
            )  # fmt: skip
    return grads


cosine_fwd = define(
    "cosine_fwd(Tensor student, Tensor teacher, float eps) -> (Tensor distance, Tensor s_norm, Tensor t_norm)",
    cosine_fwd_triton,
    cosine_fwd_fake,
)
cosine_bwd = define(
    "cosine_bwd(Tensor student, Tensor teacher, Tensor distance, Tensor s_norm, Tensor t_norm, Tensor grad, float eps, "
    "bool for_student, bool for_teacher) -> (Tensor, Tensor)",
    cosine_bwd_triton,
    cosine_bwd_fake,
)


# --- autograd ---------------------------------------------------------------------------------------------------------


class CosineFunction(torch.autograd.Function):
    """(student [N, D], teacher [N, D], eps, backend) -> (distance [N], |student|, |teacher|), the norms for itself."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        return (cosine_fwd if backend == "triton" else cosine_fwd_torch)(student, teacher, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        student, teacher, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(student, teacher, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        student, teacher, distance, s_norm, t_norm = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if grad is None:
            return None, None, None, None
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True, or under vmap: the formula serves both
            grads = torch.func.vjp(partial(cosine_distance, eps=ctx.eps), student, teacher)[1](grad)
        else:
            backward = cosine_bwd if ctx.backend == "triton" else cosine_bwd_torch
            grads = backward(student, teacher, distance, s_norm, t_norm, grad, ctx.eps, *wanted)
        for_student, for_teacher = (g if want else None for g, want in zip(grads, wanted, strict=True))
        return for_student, for_teacher, None, None  # student, teacher, eps, backend

    @staticmethod
    def vmap(info: Any, in_dims: tuple, student: Tensor, teacher: Tensor, eps: float, backend: str) -> tuple:
        student, teacher = batched_rows(info.batch_size, in_dims, student, teacher)
        out = CosineFunction.apply(student, teacher, eps, backend)
        return tuple(x.unflatten(0, (info.batch_size, len(x) // info.batch_size)) for x in out), (0, 0, 0)


def cosine_loss(
    student: Tensor,  # [..., D]
    teacher: Tensor,  # [..., D]
    *,
    weight: Tensor | None,  # [...]
    reduction: str,
    eps: float,
    backend: str,
) -> Tensor:
    width = student.shape[-1]
    distance = CosineFunction.apply(student.reshape(-1, width), teacher.reshape(-1, width), eps, backend)[0]
    return reduce(distance.reshape(student.shape[:-1]), weight, reduction)
