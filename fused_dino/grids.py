"""Tokens from one grid onto another, by two small matrices: averages of regions, and bilinear samples.

`F.adaptive_avg_pool2d` and `F.interpolate` are the same functions, and on CUDA their backward adds with atomics, in an
order that changes from run to run. A product of matrices has a fixed order. (A NaN or an infinity spreads over its
whole image here, where regions without it would be spared there: the loss is NaN in both.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .reference.dtypes import acc_dtype, without_autocast

Grid = tuple[int, int]  # (rows, columns)


class Product(torch.autograd.Function):
    """a @ b of one shape of batch, where autocast reaches neither the product nor its gradients, itself products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        for_a = Product.apply(grad, b.mT) if ctx.needs_input_grad[0] else None
        for_b = Product.apply(a.mT, grad) if ctx.needs_input_grad[1] else None
        return for_a, for_b


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (float64 as soon as one of them is): a [M, K] or [B, M, K], b [B, K, N] -> [B, M, N]."""
    dtype = acc_dtype(a, b)
    return Product.apply(a.to(dtype).expand(b.shape[0], -1, -1), b.to(dtype))


def average(size: int, onto: int, device: torch.device | None = None) -> Tensor:
    """Weights of adaptive average pooling along one axis, int64 [onto, size], each row to be divided by its sum.

    Bin i holds the positions floor(i * size / onto) up to, and without, ceil((i + 1) * size / onto).
    """
    position, i = torch.arange(size, device=device), torch.arange(onto, device=device).unsqueeze(1)
    return ((position >= i * size // onto) & (position < -(-(i + 1) * size // onto))).long()


def bilinear(size: int, onto: int, device: torch.device | None = None) -> Tensor:
    """Weights of linear interpolation along one axis with align_corners=False, int64 [onto, size], likewise.

    Sample i lies at (i + 1/2) * size / onto - 1/2, and all weights are multiples of 1 / (2 * onto). Beyond a border its
    position alone has one, which the division by the sum makes whole.
    """
    position, i = torch.arange(size, device=device), torch.arange(onto, device=device).unsqueeze(1)
    place = (2 * i + 1) * size - onto
    return (2 * onto - (place - 2 * onto * position).abs()).clamp(min=0)


def regrid(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """tokens [B, h * w, D] -> [B, r * c, D] in their dtype, by the weights rows [r, h] and columns [c, w]."""
    (batch, _, width), (r, h), (c, w) = tokens.shape, rows.shape, columns.shape
    down, across = (x.to(acc_dtype(tokens)) / x.sum(1, keepdim=True) for x in (rows, columns))
    x = product(down, tokens.reshape(batch, h, w * width))  # [B, r, w * D]
    x = product(across, x.reshape(batch * r, w, width))  # [B * r, c, D]
    return x.reshape(batch, r * c, width).to(tokens.dtype)


class Regrid(nn.Module):
    """Tokens [B, h * w, D], row by row, onto another grid: [B, r * c, D], computed in float32 (float64 for float64).

    how: `average` (F.adaptive_avg_pool2d) or `bilinear` (F.interpolate with align_corners=False). The weights are
    integers, which no cast of the module rounds, and buffers that move along with it and are in no checkpoint.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, how: Any, grid: Grid, onto: Grid) -> None:
        super().__init__()
        for name, size, to in zip(("rows", "columns"), grid, onto, strict=True):
            self.register_buffer(name, how(size, to), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return regrid(tokens, self.rows, self.columns)
