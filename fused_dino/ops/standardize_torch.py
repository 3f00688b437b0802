"""Columns standardised over all rows in plain torch: the CPU fallback. The formulas stand in ops/standardize.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.cosine import NORM_EPS
from ..reference.dtypes import without_autocast
from .blocks import by_rows
from .columns_torch import centre, passes
from .cosine_torch import unit
from .standardize_triton import Standardization


def standardize_fwd_torch(x: Tensor, options: Standardization) -> tuple[Tensor, Tensor, Tensor]:
    """The result, nothing, and the columns' sums of squares."""
    normalize, eps, dtype = options
    if normalize:
        with without_autocast(x):  # to which vecdot is a matrix product
            (x,) = by_rows(lambda rows: unit(rows.to(dtype), NORM_EPS)[:1], (x.new_empty(x.shape, dtype=dtype),), x)
    out, squares = centre(x, dtype)
    divisor = (squares / (out.shape[0] - 1)).sqrt() + eps
    for rows in passes(out):
        out[rows] /= divisor
    return out, out.new_empty(0), squares


def standardize_bwd_torch(
    grad: Tensor, x: Tensor, out: Tensor, factors: Tensor, squares: Tensor, options: Standardization
) -> Tensor:
    normalize, eps, _ = options
    mean, along = torch.zeros_like(squares), torch.zeros_like(squares)
    for rows in passes(grad):
        mean += grad[rows].sum(0)
        along += (grad[rows] * out[rows]).sum(0)
    count = out.shape[0]
    sigma = (squares / (count - 1)).sqrt()
    mean, divisor = mean / count, sigma + eps
    share = torch.where(sigma == 0, 0, along / ((count - 1) * sigma))

    def some_rows(grad: Tensor, out: Tensor, x: Tensor) -> tuple[Tensor]:
        g = (grad - mean).div_(divisor).addcmul_(out, share, value=-1)
        if not normalize:
            return (g,)
        z, inverse, clamped = unit(x.to(out.dtype), NORM_EPS)
        return ((g - z * torch.where(clamped, 0, torch.linalg.vecdot(z, g).unsqueeze(-1))).mul_(inverse),)

    with without_autocast(x):
        return by_rows(some_rows, (x.new_empty(x.shape),), grad, out, x)[0]
