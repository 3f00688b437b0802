"""Standardised columns in plain torch: the CPU fallback. The formulas stand in ops/standardize.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.dtypes import without_autocast
from .blocks import by_rows
from .columns_torch import centre, off, passes
from .cosine_torch import clear_, unit
from .standardize_triton import Standardization


def centre_left(x: Tensor, left: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x minus the column means of the rows left, and the columns' sums of squares; the other rows become 0."""
    near = x.index_select(0, counts[1:])[0].to(dtype)

    def mean_beyond(near: Tensor) -> Tensor:
        total = torch.zeros_like(near)
        for rows in passes(x):
            total += clear_(x[rows] - near, left[rows]).sum(0)
        return total / counts[0]

    near = near + mean_beyond(near)  # the first row may be far from the mean; the mean of a constant column is exact
    means = torch.stack([near, mean_beyond(near)])
    centred, squares = x.new_empty(x.shape, dtype=dtype), torch.zeros_like(near)
    for rows in passes(x):
        squares += clear_(off(x[rows], means, centred[rows]), left[rows]).square().sum(0)
    return centred, squares


def standardize_fwd_torch(
    x: Tensor, weight: Tensor | None, counts: Tensor | None, options: Standardization
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, an empty tensor in place of the factors, and the columns' sums of squares."""
    normalize, eps, norm_eps, dtype = options
    if normalize:
        with without_autocast(x):  # autocast takes vecdot for a matrix product
            (x,) = by_rows(lambda rows: unit(rows.to(dtype), norm_eps)[:1], (x.new_empty(x.shape, dtype=dtype),), x)
    left = None if weight is None else weight.unsqueeze(-1) != 0
    if left is None or counts is None:
        out, squares = centre(x, dtype)
    else:
        out, squares = centre_left(x, left, counts, dtype)
    count: int | Tensor = x.shape[0] if counts is None else counts[0]
    divisor = (squares / (count - 1)).sqrt() + eps
    for rows in passes(out):
        out[rows] /= divisor
        if left is not None:
            clear_(out[rows], left[rows])  # 0 / 0, or over the deviation of fewer than two rows, is NaN
    return out, out.new_empty(0), squares


def standardize_bwd_torch(
    grad: Tensor, x: Tensor, weight: Tensor | None, counts: Tensor | None, out: Tensor, factors: Tensor,
    squares: Tensor, options: Standardization,
) -> Tensor:  # fmt: skip
    """Return the gradient of x."""
    normalize, eps, norm_eps, _ = options
    left = None if weight is None else weight.unsqueeze(-1) != 0
    count: int | Tensor = x.shape[0] if counts is None else counts[0]
    mean, product = torch.zeros_like(squares), torch.zeros_like(squares)
    for rows in passes(grad):
        mean += grad[rows].sum(0)
        product += (grad[rows] * out[rows]).sum(0)
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
        grad_x = by_rows(gradient_of_block, (x.new_empty(x.shape),), grad, out, x)[0]
    return grad_x if left is None else clear_(grad_x, left)
