"""Measure the squared error of unit rows: a forward reads two inputs, and a gradient is written as one more."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import costs
from fused_dino import functional as FD

from .harness import Bench, pair
from .shapes import FORWARD, ROWS, WHITENED, Row


def recipe(student: Tensor, teacher: Tensor, whiten: bool = False) -> Tensor:
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    if whiten:
        s, t = ((x - x.mean(0)) / (x.std(0) + 1e-5) for x in (s, t))
    return F.mse_loss(s, t)


def work(row: Row, direction: str) -> tuple[float, float]:
    whiten = row.options.get("whiten", False)
    return costs.mse_loss(row.shape, getattr(torch, row.dtype).itemsize, direction != FORWARD, whiten)


BENCH = Bench(
    op="mse_loss",
    rows=(*ROWS, WHITENED),
    inputs=pair,
    recipe=lambda row: partial(recipe, whiten=row.options.get("whiten", False)),
    ours=lambda row, backend: partial(FD.mse_loss, whiten=row.options.get("whiten", False), backend=backend),  # type: ignore[arg-type]
    work=work,
)
