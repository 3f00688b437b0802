"""Columns centred in plain torch, with their sums of squares: what VICReg and whitening begin with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import blocks

CPU_ELEMENTS = 2**21  # of a block: what one pass makes of them is still in a cache for the next
FIRST = 16  # rows whose mean is near that of all


def passes(x: Tensor) -> Iterator[slice]:
    """Blocks of rows for sums and products over all of them."""
    return blocks(x, max(1, CPU_ELEMENTS // max(1, x.shape[1])))


def start(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns numbers near the mean of each column, [D]."""
    near = x[:1].sum(0, dtype=dtype)
    # An exported program may not depend on whether there are as many rows as FIRST.
    first = x if torch.compiler.is_exporting() else x[:FIRST]
    near += (first - near).mean(0)
    return near


def mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns column means as [2, D]: a rough mean and its correction, subtracted in turn by off().

    A large mean in one number would round small deviations, and so would a first row far from it. The mean of a
    constant column is exact.
    """
    near = start(x, dtype)
    total = torch.zeros_like(near)
    for rows in passes(x):
        total += (x[rows] - near).sum(0)
    return torch.stack([near, total / x.shape[0]])


def off(x: Tensor, mean: Tensor, out: Tensor | None = None) -> Tensor:
    """x - mean."""
    return torch.sub(x, mean[0], out=out).sub_(mean[1])


def centre_block(x: Tensor, mean: Tensor) -> Tensor:
    """off(x, mean(x)) of columns that a cache holds whole, in one pass less; their mean is written to `mean`."""
    near, left = mean
    near.copy_(start(x, mean.dtype))
    centred = x - near
    torch.sum(centred, 0, out=left).div_(x.shape[0])
    return centred.sub_(left)


def centre(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns x minus its column means, and the columns' sums of squares."""
    means = mean(x, dtype)
    centred, squares = x.new_empty(x.shape, dtype=dtype), torch.zeros_like(means[0])
    for rows in passes(x):
        squares += off(x[rows], means, centred[rows]).square().sum(0)
    return centred, squares
