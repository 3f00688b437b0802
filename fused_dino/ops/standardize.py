"""Columns standardised over all rows: the autograd.Function over its closed form (standardize_torch.py) and its
kernels (standardize_triton.py).

With z the rows as they are or over their norms, N of them, and in every column

    y = (z - mean) / (s + eps),   s = sqrt(sum (z - mean)^2 / (N - 1))

the gradient of z, for g that of y, is

    u = (g - mean(g)) / (s + eps) - y sum(g y) / ((N - 1) s)

without its second term where a column is constant, as in torch; and that of x, for z = x / max(|x|, 1e-12), is
(u - <z, u> z) / |x|, or u / 1e-12 where the norm is clamped.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.cosine import prepare
from .dispatch import is_batched, keep_signature
from .standardize_torch import standardize_bwd_torch, standardize_fwd_torch
from .standardize_triton import standardize_bwd, standardize_fwd


def formula(x: Tensor, normalize: bool, eps: float, dtype: torch.dtype) -> Tensor:
    """The reference's, for whoever differentiates the gradient."""
    return prepare(x.to(dtype), normalize, eps)


@keep_signature
class StandardizeFunction(torch.autograd.Function):
    """(x [N, D], normalize, eps, dtype, backend) -> (y [N, D] of that dtype; what its rows were multiplied by; the
    columns' sums of squares), the last two for itself."""

    @staticmethod
    def forward(
        x: Tensor, normalize: bool, eps: float, dtype: torch.dtype, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = standardize_fwd if backend == "triton" else standardize_fwd_torch
        return run(x, normalize, eps, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, *how, ctx.backend = inputs
        ctx.how = tuple(how)
        ctx.save_for_backward(x, *output)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None, None]:
        x, out, factors, squares = ctx.saved_tensors
        normalize, eps, dtype = ctx.how
        if grad is None:
            return None, None, None, None, None
        if torch.is_grad_enabled() or is_batched(grad):  # create_graph=True, or under vmap: the formula serves both
            (made,) = torch.func.vjp(partial(formula, normalize=normalize, eps=eps, dtype=dtype), x)[1](grad)
        else:
            run = standardize_bwd if ctx.backend == "triton" else standardize_bwd_torch
            made = run(grad, out, x, factors, squares, normalize, eps)
        return made, None, None, None, None  # x, normalize, eps, dtype, backend

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, *how: Any) -> tuple:
        """Batch by batch: the columns of one have no share in those of another."""
        made = [StandardizeFunction.apply(each, *how) for each in x.unbind(in_dims[0])]
        stacked = tuple(map(torch.stack, zip(*made, strict=True)))
        return stacked, (0,) * len(stacked)


def standardize(x: Tensor, normalize: bool, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    """[N, D] -> [N, D] of `dtype`."""
    return StandardizeFunction.apply(x, normalize, eps, dtype, backend)[0]
