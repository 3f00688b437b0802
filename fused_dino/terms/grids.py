"""Resampling of tokens from one grid onto another by two small matrices: averages of regions, or bilinear samples.

`F.adaptive_avg_pool2d` and `F.interpolate` are the same functions, and on CUDA their backward adds with atomics, in an
order that changes from run to run. A product of matrices has a fixed order. It spreads a NaN or an infinity over the
whole image, where those spread it over some regions. The loss is NaN either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Grid
from ..hidden import move
from ..ops.plain import forward_mode
from ..reference.dtypes import acc_dtype, without_autocast


class Product(torch.autograd.Function):
    """The product a @ b. Autocast reaches neither it nor its gradients, which are products too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with without_autocast(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        a, b = inputs  # each is needed for the other's gradient alone: constant weights keep no tokens
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = Product.apply(grad, b.mT) if ctx.needs_input_grad[0] else None
        grad_b = Product.apply(a.mT, grad) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in float32 or float64 (see acc_dtype): a [M, K] or [B, M, K], b [B, K, N] -> [B, M, N]."""
    dtype = acc_dtype(a, b)
    if forward_mode() and not torch.compiler.is_compiling():  # a Function with a jvp is none that Dynamo takes
        with without_autocast(a):
            return a.to(dtype) @ b.to(dtype)
    return Product.apply(a.to(dtype).expand(b.shape[0], -1, -1), b.to(dtype))


def average(size: int, onto: int, device: torch.device | None = None) -> Tensor:
    """Return the weights of adaptive average pooling along one axis, int64 [onto, size]. Divide each row by its sum.

    Bin i holds the positions from floor(i * size / onto) to ceil((i + 1) * size / onto) - 1.
    """
    position, i = torch.arange(size, device=device), torch.arange(onto, device=device).unsqueeze(1)
    return ((position >= i * size // onto) & (position < -(-(i + 1) * size // onto))).long()


def bilinear(size: int, onto: int, device: torch.device | None = None) -> Tensor:
    """Return the weights of linear interpolation along one axis (align_corners=False), like those of `average`.

    Sample i lies at (i + 1/2) * size / onto - 1/2, and all weights are multiples of 1 / (2 * onto). Past a border only
    the position at the border has a weight, and dividing by the sum makes it 1.
    """
    position, i = torch.arange(size, device=device), torch.arange(onto, device=device).unsqueeze(1)
    place = (2 * i + 1) * size - onto
    return (2 * onto - (place - 2 * onto * position).abs()).clamp(min=0)


def regrid(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resample tokens [B, h * w, D] to [B, r * c, D] in their dtype, by the weights rows [r, h] and columns [c, w]."""
    (batch, _, width), (r, h), (c, w) = tokens.shape, rows.shape, columns.shape
    down, across = (x.to(acc_dtype(tokens)) / x.sum(1, keepdim=True) for x in (rows, columns))
    x = product(down, tokens.reshape(batch, h, w * width))  # [B, r, w * D]
    x = product(across, x.reshape(batch * r, w, width))  # [B * r, c, D]
    return x.reshape(batch, r * c, width).to(tokens.dtype)


class Regrid(nn.Module):
    """Resamples tokens [B, h * w, D], row by row, onto another grid: [B, r * c, D].

    how: `average` (F.adaptive_avg_pool2d) or `bilinear` (F.interpolate with align_corners=False). It computes in
    float32, or float64 for float64. The weights are integers, which no cast of the module rounds. They move with it,
    and are in no checkpoint.
    """

    def __init__(self, how: Any, grid: Grid, onto: Grid) -> None:
        super().__init__()
        self.weights = [how(size, to, torch.device("cpu")) for size, to in zip(grid, onto, strict=True)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Regrid:
        super()._apply(fn, recurse)
        self.weights = [move(x, fn) for x in self.weights]
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        return regrid(tokens, *(x.to(tokens.device) for x in self.weights))
