"""Mean squared error between rows of length one: what moves is two inputs in, and with a gradient one more out."""

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
    """Two norms and a squared difference; with a gradient two scaled rows and their sum. Whitening takes two means, two
    deviations and what they are taken off and over; with a gradient two more sums, and what these are."""
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
