"""Cosine and mean squared error of normalised rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import upcast


def reduce(values: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce weighted values. mean: sum(w v) / sum(w), or 0 where the weights sum to 0; sum: sum(w v); none: w v."""
    if weight is not None:
        weight = weight.to(values.dtype).expand_as(values)
        values = values * weight
    if reduction == "none":
        return values
    if reduction == "sum":
        return values.sum()
    if weight is None:
        return values.mean()
    total = weight.sum()
    return values.sum() / torch.where(total == 0, 1, total)


def cosine_distance(student: Tensor, target: Tensor, eps: float) -> Tensor:
    """Return 1 - <s / max(|s|, eps), t / max(|t|, eps)> per row: [..., D], [..., D] -> [...]."""
    s, t = (F.normalize(x, dim=-1, eps=eps) for x in upcast(student, target))
    return 1 - (s * t).sum(-1)


def cosine_loss(
    student: Tensor,  # [..., D]
    target: Tensor,  # [..., D]
    *,
    weight: Tensor | None,  # [...]
    reduction: str,
    eps: float,
) -> Tensor:
    """Return the cosine distance per row, reduced."""
    return reduce(cosine_distance(student, target, eps), weight, reduction)


def mse_loss(
    student: Tensor,  # [..., D]
    target: Tensor,  # [..., D]
    *,
    normalize: bool,
    whiten: bool,
    weight: Tensor | None,  # [...]
    reduction: str,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """Return (s - t)^2 per element, reduced. First it divides rows by their norm and standardises columns, as asked."""
    whiten_eps = eps if whiten else None
    s, t = (prepare(x, normalize=normalize, norm_eps=norm_eps, whiten_eps=whiten_eps) for x in upcast(student, target))
    return reduce((s - t).square(), None if weight is None else weight.unsqueeze(-1), reduction)


def prepare(x: Tensor, *, normalize: bool, norm_eps: float, whiten_eps: float | None = None) -> Tensor:
    """Divide rows by their norm with `normalize`, then standardise columns with `whiten_eps`, unless it is None."""
    if normalize:
        x = F.normalize(x, dim=-1, eps=norm_eps)
    return x if whiten_eps is None else standardize(x.reshape(-1, x.shape[-1]), whiten_eps).reshape(x.shape)


def standardize(x: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / (deviation + eps) per column, the deviation unbiased: [N, D] -> [N, D]."""
    return (x - x.mean(0)) / (x.std(0) + eps)
