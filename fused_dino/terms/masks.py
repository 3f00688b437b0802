"""Rows of weight 0: what they hold must not reach others through what all rows share.

A loss leaves such rows out by itself. Before it stand a projector, whose weights would get 0 * NaN as a gradient, and
products that mix the rows of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype


def counts(weight: Tensor, x: Tensor) -> Tensor:
    """Return which rows of x count. A weight that is 0 in the dtype of the arithmetic leaves its row out."""
    return weight.to(acc_dtype(x)) != 0


def blank(x: Tensor, weight: Tensor | None, value: float = 0.0) -> Tensor:
    """Return x with `value` in the rows that are left out. weight: of the first dimensions of x, broadcastable."""
    if weight is None:
        return x
    kept = counts(weight, x)
    return torch.where(kept.reshape(*kept.shape, *(1,) * (x.ndim - kept.ndim)), x, value)


def bring_rows(bring: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Bring rows [B, N, D] to another grid, and their weights where these are [B, N].

    A row there is the mean of the rows by it that count, whose shares in it are those of resampling.
    """
    if weight is None or weight.ndim == 1:
        return bring(x), weight
    dtype = acc_dtype(x)
    kept = counts(weight, x).unsqueeze(2).to(dtype)
    shares = bring(kept)
    if shares is kept:  # this is that grid
        return x, weight
    sums = bring(blank(x.to(dtype), weight))
    return sums / torch.where(shares == 0, 1, shares), bring(weight.to(dtype).unsqueeze(2)).squeeze(2)
