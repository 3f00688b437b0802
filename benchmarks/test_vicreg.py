"""Measure VICReg against a frozen teacher: one product of rows or columns, and twice as much for its gradient."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_dino import costs
from fused_dino import functional as FD

from .harness import Bench, Function, pair
from .shapes import BATCHES, FORWARD, Row


def recipe(student: Tensor, teacher: Tensor) -> Tensor:
    y, g = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    invariance = (y - g).pow(2).mean()
    variance = torch.relu(1 - y.var(dim=0, unbiased=False).add(1e-4).sqrt()).mean()
    centred = y - y.mean(dim=0, keepdim=True)
    c = centred.t() @ centred / max(len(y) - 1, 1)
    covariance = (c - torch.diag(torch.diag(c))).pow(2).mean()
    return 25 * invariance + 10 * variance + 0.5 * covariance


def ours(row: Row, backend: Any) -> Function:
    loss = partial(FD.vicreg_loss, backend=backend)
    return lambda student, teacher: loss(student, teacher).loss


def work(row: Row, direction: str) -> tuple[float, float]:
    return costs.vicreg_loss(row.shape, getattr(torch, row.dtype).itemsize, direction != FORWARD)


BENCH = Bench("vicreg_loss", BATCHES, pair, lambda row: recipe, ours, work)
