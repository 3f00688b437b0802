"""Standardised columns: the autograd.Function over the closed form (standardize_torch.py) and the kernels
(standardize_triton.py).

With z the rows as they are or over their norms, N of them, and in every column

    y = (z - mean) / (s + eps),   s = sqrt(sum (z - mean)^2 / (N - 1))

the gradient of z, for g that of y, is

    u = (g - mean(g)) / (s + eps) - y sum(g y) / ((N - 1) s)

without its second term where a column is constant, as in torch. The gradient of x, for z = x / max(|x|, norm_eps), is
(u - <z, u> z) / |x|, or u / norm_eps where the norm is clamped.

With a weight the statistics, and N, are those of the rows whose weight is not 0, each counted once. The other rows are
left out, whatever they hold: their result and their gradient are 0. The gradient of their result must be 0 as well, as
it is in a loss of the same weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.cosine import prepare
from .function import make_function
from .standardize_torch import standardize_bwd_torch, standardize_fwd_torch
from .standardize_triton import Standardization, standardize_bwd, standardize_fwd


def forward(
    x: Tensor, weight: Tensor | None, counts: Tensor | None, options: Standardization, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what standardize_fwd_empty allocates."""
    return (standardize_fwd if backend == "triton" else standardize_fwd_torch)(x, weight, counts, options)


def backward(ctx: Any, saved: tuple[Tensor, ...], grads: tuple[Tensor], needs_grad: tuple[bool]) -> tuple[Tensor]:
    """Return the gradient of x."""
    run = standardize_bwd if ctx.backend == "triton" else standardize_bwd_torch
    (grad,), (x, weight, counts, out, factors, squares) = grads, saved
    return (run(grad, x, weight, counts, out, factors, squares, ctx.options),)


def formula(x: Tensor, weight: Tensor | None, counts: Tensor | None, options: Standardization) -> Tensor:
    """Return the result by eager formulas, for higher derivatives."""
    normalize, eps, norm_eps, dtype = options
    return prepare(x.to(dtype), weight, normalize=normalize, norm_eps=norm_eps, whiten_eps=eps)


standardize_function = make_function("StandardizeFunction", forward, backward, formula, inputs=1, saved=0)


def standardize(
    x: Tensor, options: Standardization, backend: str, weight: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Standardise the columns of [N, D], after dividing rows by their norms if asked.

    Args:
        weight: [N]. A row of weight 0 is left out. None: all rows count.
        counts: What count_rows says of the weight.
    """
    return standardize_function(x, weight, counts, options, backend)[0]


def count_rows(weight: Tensor) -> Tensor:
    """Return how many rows have a weight other than 0, and the first of them: [2] int64, not read on the host."""
    left = weight.reshape(-1) != 0
    return torch.stack([left.sum(), left.int().argmax()])
