"""Cosine and mean squared error of normalised rows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import upcast

NORM_EPS = 1e-12  # of F.normalize


def reduce(values: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """mean: sum(w v) / sum(w), and 0 where the weights sum to 0; sum: sum(w v); none: w v."""
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


def cosine_distance(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """1 - <s / max(|s|, eps), t / max(|t|, eps)> per row: [..., D], [..., D] -> [...]."""
    s, t = (F.normalize(x, dim=-1, eps=eps) for x in upcast(student, teacher))
    return 1 - (s * t).sum(-1)


def cosine_loss(
    student: Tensor,  # [..., D]
    teacher: Tensor,  # [..., D]
    *,
    weight: Tensor | None,  # [...]
    reduction: str,
    eps: float,
) -> Tensor:
    """The cosine distance per row, reduced."""
    return reduce(cosine_distance(student, teacher, eps), weight, reduction)


def mse_loss(
    student: Tensor,  # [..., D]
    teacher: Tensor,  # [..., D]
    *,
    normalize: bool,
    whiten: bool,
    weight: Tensor | None,  # [...]
    reduction: str,
    eps: float,
) -> Tensor:
    """(s - t)^2 per element, reduced; before it rows are divided by their norm, and columns standardised, as asked."""
    s, t = prepared(student, teacher, normalize, eps if whiten else None)
    return reduce((s - t).square(), None if weight is None else weight.unsqueeze(-1), reduction)


def prepared(student: Tensor, teacher: Tensor, normalize: bool, whiten: float | None) -> tuple[Tensor, ...]:
    """Both, each as prepare makes it."""
    return tuple(prepare(x, normalize, whiten) for x in upcast(student, teacher))


def prepare(x: Tensor, normalize: bool, whiten: float | None) -> Tensor:
    """Rows divided by their norm, and columns standardised with the eps `whiten`, as asked."""
    if normalize:
        x = F.normalize(x, dim=-1, eps=NORM_EPS)
    return x if whiten is None else standardize(x.reshape(-1, x.shape[-1]), whiten).reshape(x.shape)


def standardize(x: Tensor, eps: float) -> Tensor:
    """(x - mean) / (deviation + eps) per column, the deviation unbiased: [N, D] -> [N, D]."""
    return (x - x.mean(0)) / (x.std(0) + eps)
