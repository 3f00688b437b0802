"""Cosine between rows: what moves is two inputs in, and with a gradient one more out."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import functional as FD

from .harness import Bench, normal
from .shapes import ROWS, Row


def inputs(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    return normal(row.shape, row, generator), normal(row.shape, row, generator)


def recipe(student: Tensor, teacher: Tensor) -> Tensor:
    return (1 - (F.normalize(student, dim=-1) * F.normalize(teacher, dim=-1)).sum(-1)).mean()


def moved(row: Row) -> tuple[float, float]:
    size = math.prod(row.shape) * getattr(torch, row.dtype).itemsize
    return 2 * size, 3 * size


def computed(row: Row) -> tuple[float, float]:
    """Three products of rows; then two scaled rows and their sum."""
    return 6 * math.prod(row.shape), 10 * math.prod(row.shape)


BENCH = Bench(
    op="cosine_loss",
    rows=ROWS,
    inputs=inputs,
    recipe=lambda row: recipe,
    ours=lambda row, backend: partial(FD.cosine_loss, backend=backend),  # type: ignore[arg-type]
    bytes=moved,
    flops=computed,
)
