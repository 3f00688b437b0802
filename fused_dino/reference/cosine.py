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


def leave_out(x: Tensor, weight: Tensor | None) -> Tensor:
    """Replace rows of weight 0 by ones. Their loss and its gradient, times 0, are then 0, whatever they held."""
    return x if weight is None else x.masked_fill((weight == 0).unsqueeze(-1), 1)


def cosine_distance(student: Tensor, target: Tensor, eps: float) -> Tensor:
    """Return 1 - <s / max(|s|, eps), t / max(|t|, eps)> per row: [..., D], [..., D] -> [...]."""
    s, t = (F.normalize(x, dim=-1, eps=eps) for x in upcast(student, target))
    return 1 - (s * t).sum(-1)


def take_rows(target: Tensor, index: Tensor) -> Tensor:
    """Return target[b, index[b, m]], or NaN where it has no such row: [B, N, D], [B, M] -> [B, M, D]."""
    outside = (index < 0) | (index >= target.shape[1])
    at = index.long().masked_fill(outside, 0).unsqueeze(-1).expand(-1, -1, target.shape[-1])
    return target.gather(1, at).masked_fill(outside.unsqueeze(-1), float("nan"))


def cosine_loss(
    student: Tensor,  # [..., D]
    target: Tensor,  # [..., D], or [B, N, D] with an index
    *,
    index: Tensor | None = None,  # [B, M]
    weight: Tensor | None,  # [...]
    reduction: str,
    eps: float,
) -> Tensor:
    """Return the cosine distance per row, reduced."""
    target = target if index is None else take_rows(target, index)
    student, target = (leave_out(x, weight) for x in (student, target))
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
    s, t = (
        prepare(x, weight, normalize=normalize, norm_eps=norm_eps, whiten_eps=whiten_eps)
        for x in upcast(student, target)
    )
    return reduce((s - t).square(), None if weight is None else weight.unsqueeze(-1), reduction)


def prepare(
    x: Tensor, weight: Tensor | None = None, *, normalize: bool, norm_eps: float, whiten_eps: float | None = None
) -> Tensor:
    """Divide rows by their norm with `normalize`, then standardise columns with `whiten_eps`, unless it is None.

    Rows of weight 0 are left out, and their values reach no result.
    """
    x = leave_out(x, weight)
    if normalize:
        x = F.normalize(x, dim=-1, eps=norm_eps)
    if whiten_eps is None:
        return x
    rows = x.reshape(-1, x.shape[-1])
    return standardize(rows, whiten_eps, None if weight is None else weight.reshape(-1)).reshape(x.shape)


def standardize(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """Return (x - mean) / (deviation + eps) per column, the deviation unbiased: [N, D] -> [N, D].

    The statistics are those of the rows whose weight is not 0, each counted once; fewer than two give NaN. The other
    rows become 0.
    """
    if weight is None:
        return (x - x.mean(0)) / (x.std(0) + eps)
    left = (weight != 0).unsqueeze(-1)
    count = left.sum(dtype=x.dtype)
    mean = torch.where(left, x, 0).sum(0) / count
    centred = torch.where(left, x - mean, 0)
    deviation = torch.linalg.vector_norm(centred, dim=0) / (count - 1).sqrt()
    return torch.where(left, centred / (deviation + eps), 0)
