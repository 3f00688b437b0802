"""Mean squared error between rows of length one: what moves is two inputs in, and with a gradient one more out."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import functional as FD

from .harness import Bench, normal
from .shapes import FORWARD, ROWS, Row


def inputs(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    return normal(row.shape, row, generator), normal(row.shape, row, generator)


def recipe(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1))


def work(row: Row, direction: str) -> tuple[float, float]:
    """Two norms and a squared difference; with a gradient two scaled rows and their sum."""
    elements = math.prod(row.shape)
    tensors, operations = (2, 7) if direction == FORWARD else (3, 11)
    return tensors * elements * getattr(torch, row.dtype).itemsize, operations * elements


BENCH = Bench(
    op="mse_loss",
    rows=ROWS,
    inputs=inputs,
    recipe=lambda row: recipe,
    ours=lambda row, backend: partial(FD.mse_loss, backend=backend),  # type: ignore[arg-type]
    work=work,
)
