"""Measure the cosine of rows: a forward reads two inputs, and a gradient is written as one more."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import costs
from fused_dino import functional as FD

from .harness import Bench, pair
from .shapes import FORWARD, ROWS, Row


def recipe(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)).mean()


def work(row: Row, direction: str) -> tuple[float, float]:
    return costs.cosine_loss(row.shape, getattr(torch, row.dtype).itemsize, direction != FORWARD)


BENCH = Bench(
    op="cosine_loss",
    rows=ROWS,
    inputs=pair,
    recipe=lambda row: recipe,
    ours=lambda row, backend: partial(FD.cosine_loss, backend=backend),  # type: ignore[arg-type]
    work=work,
)
