"""VICReg: the recipe's definition, and once lightly's, whose own terms are a peer there."""

import math
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from fused_dino import functional as FD
from fused_dino.losses import PRESETS

from .harness import Bench, Function, normal
from .shapes import BACKWARD, BATCHES, Row

LIGHTLY = replace(BATCHES[0], reason="as lightly defines it", options={"preset": "lightly"}, quick=False)


def inputs(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    return normal(row.shape, row, generator), normal(row.shape, row, generator)


def eager(student: Tensor, teacher: Tensor, var_weight: float, cov_weight: float, published: bool) -> Tensor:
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    y, g = student.to(wide), teacher.to(wide)
    deviation = y.var(dim=0, unbiased=published).add(1e-4).sqrt()
    yc = y - y.mean(dim=0, keepdim=True)
    c = yc.t() @ yc / max(len(y) - 1, 1)
    square = (c - torch.diag(torch.diag(c))).pow(2)
    covariance = square.sum() / len(c) if published else square.mean()
    return 25 * (y - g).pow(2).mean() + var_weight * torch.relu(1 - deviation).mean() + cov_weight * covariance


def recipe(row: Row) -> Function:
    published = "preset" in row.options
    weights = (12.5, 1.0) if published else (10.0, 0.5)
    return partial(eager, var_weight=weights[0], cov_weight=weights[1], published=published)


def ours(row: Row, backend: str) -> Function:
    options = PRESETS[row.options.get("preset", "recipe")]
    return lambda student, teacher: FD.vicreg_loss(student, teacher, backend=backend, **options).loss  # type: ignore[arg-type]


def lightly(row: Row) -> Function | None:
    """Its terms, of the student alone as here; its module has the teacher's as well."""
    if "preset" not in row.options:
        return None
    from lightly.loss import vicreg_loss as terms

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        own = 12.5 * terms.variance_loss(student) + terms.covariance_loss(student)
        return 25 * terms.invariance_loss(student, teacher) + own

    return loss


def work(row: Row, direction: str) -> tuple[float, float]:
    """Two inputs in, and a gradient out; half a symmetric product, and with a gradient a whole one more."""
    size = math.prod(row.shape)
    product = size * min(row.shape)
    bytes_of_one = size * getattr(torch, row.dtype).itemsize
    return (3 * bytes_of_one, 3 * product) if direction == BACKWARD else (2 * bytes_of_one, product)


BENCH = Bench(
    op="vicreg_loss",
    rows=(LIGHTLY, *BATCHES),
    inputs=inputs,
    recipe=recipe,
    ours=ours,
    work=work,
    peers={"lightly": lightly if find_spec("lightly") else None},
)
