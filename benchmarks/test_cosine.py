"""Measure the cosine of rows: a forward reads two inputs, and a gradient is written as one more."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import functional as FD

from .harness import Bench, pair
from .shapes import FORWARD, ROWS, Row


def recipe(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)).mean()


def work(row: Row, direction: str) -> tuple[float, float]:
    """Count three products of rows; a gradient adds two scaled rows and their sum."""
    elements = math.prod(row.shape)
    tensors, operations = (2, 6) if direction == FORWARD else (3, 10)
    return tensors * elements * getattr(torch, row.dtype).itemsize, operations * elements


BENCH = Bench(
    op="cosine_loss",
    rows=ROWS,
    inputs=pair,
    recipe=lambda row: recipe,
    ours=lambda row, backend: partial(FD.cosine_loss, backend=backend),  # type: ignore[arg-type]
    work=work,
)
