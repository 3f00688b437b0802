"""Columns centred in plain torch, with their sums of squares: what VICReg and whitening begin with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import blocks

CPU_ELEMENTS = 2**19  # of a block of rows: what one pass makes of them is still in a core's cache for the next
FIRST = 64  # rows whose mean is near that of all


def passes(x: Tensor) -> Iterator[slice]:
    """Blocks of rows for sums over all of them."""
    return blocks(x, max(1, CPU_ELEMENTS // max(1, x.shape[1])))


def centre(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x - mean(x) per column, its sums of squares). The first rows' mean is taken off before: a large one would round
    the small deviations, and so would a first row far from it."""
    pivot = x[:1].sum(0, dtype=dtype)
    pivot += (x[:FIRST] - pivot).mean(0)
    centred = x.new_empty(x.shape, dtype=dtype)
    total = torch.zeros_like(pivot)
    for rows in passes(x):
        total += torch.sub(x[rows], pivot, out=centred[rows]).sum(0)
    total /= len(x)
    squares = torch.zeros_like(total)
    for rows in passes(x):
        centred[rows] -= total
        squares += centred[rows].square().sum(0)
    return centred, squares
