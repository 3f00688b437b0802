"""Measure the squared error of unit rows: a forward reads two inputs, and a gradient is written as one more."""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import functional as FD

from .harness import Bench, pair
from .shapes import FORWARD, ROWS, WHITENED, Row


def recipe(student: Tensor, teacher: Tensor, whiten: bool = False) -> Tensor:
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    if whiten:
        s, t = ((x - x.mean(0)) / (x.std(0) + 1e-5) for x in (s, t))
    return F.mse_loss(s, t)


def work(row: Row, direction: str) -> tuple[float, float]:
    """Count two norms and a squared difference; a gradient adds two scaled rows and their sum.

    Whitening adds two means, two deviations, and their subtraction and division; a gradient adds two sums over rows.
    """
    elements = math.prod(row.shape)
    tensors, operations = (2, 7) if direction == FORWARD else (3, 11)
    if row.options.get("whiten"):
        operations += 10 if direction == FORWARD else 18
    return tensors * elements * getattr(torch, row.dtype).itemsize, operations * elements


BENCH = Bench(
    op="mse_loss",
    rows=(*ROWS, WHITENED),
    inputs=pair,
    recipe=lambda row: partial(recipe, whiten=row.options.get("whiten", False)),
    ours=lambda row, backend: partial(FD.mse_loss, whiten=row.options.get("whiten", False), backend=backend),  # type: ignore[arg-type]
    work=work,
)
