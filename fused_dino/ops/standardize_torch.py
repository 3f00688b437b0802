"""Standardised columns in plain torch: the CPU fallback. The formulas stand in ops/standardize.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.dtypes import without_autocast
from .blocks import by_rows
from .columns_torch import centre, passes
from .cosine_torch import unit
from .standardize_triton import Standardization


def standardize_fwd_torch(x: Tensor, options: Standardization) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, an empty tensor in place of the factors, and the columns' sums of squares."""
    normalize, eps, norm_eps, dtype = options
    if normalize:
        with without_autocast(x):  # autocast takes vecdot for a matrix product
            (x,) = by_rows(lambda rows: unit(rows.to(dtype), norm_eps)[:1], (x.new_empty(x.shape, dtype=dtype),), x)
    out, squares = centre(x, dtype)
    divisor = (squares / (out.shape[0] - 1)).sqrt() + eps
    for rows in passes(out):
        out[rows] /= divisor
    return out, out.new_empty(0), squares


def standardize_bwd_torch(
    grad: Tensor, x: Tensor, out: Tensor, factors: Tensor, squares: Tensor, options: Standardization
) -> Tensor:
    """Return the gradient of x."""
    normalize, eps, norm_eps, _ = options
    mean, product = torch.zeros_like(squares), torch.zeros_like(squares)
    for rows in passes(grad):
        mean += grad[rows].sum(0)
        product += (grad[rows] * out[rows]).sum(0)
    count = out.shape[0]
    sigma = (squares / (count - 1)).sqrt()
    mean, divisor = mean / count, sigma + eps
    slope = torch.where(sigma == 0, 0, product / ((count - 1) * sigma))

    def gradient_of_block(grad: Tensor, out: Tensor, x: Tensor) -> tuple[Tensor]:
        g = (grad - mean).div_(divisor).addcmul_(out, slope, value=-1)
        if not normalize:
            return (g,)
        z, inverse, clamped = unit(x.to(out.dtype), norm_eps)
        return ((g - z * torch.where(clamped, 0, torch.linalg.vecdot(z, g).unsqueeze(-1))).mul_(inverse),)

    with without_autocast(x):
        return by_rows(gradient_of_block, (x.new_empty(x.shape),), grad, out, x)[0]
