"""VICReg as the second of three ranks computes it, without a process group: for compilers and memory checkers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_dino.ops.vicreg_exchange import Moments, Ranks
from fused_dino.ops.vicreg_plan import BackwardOptions, make_plan
from fused_dino.ops.vicreg_ranks_triton import vicreg_ranks_triton
from fused_dino.reference.dtypes import acc_dtype


class MiddleRank(Ranks):
    """Stands between two ranks that have as many rows, and exchanges nothing."""

    @property
    def own(self) -> slice:
        return slice(self.counts[0], 2 * self.counts[0])

    def start_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        return lambda: rows.repeat(3, 1)

    def sum(self, x: Tensor) -> Tensor:
        return x

    def first(self, x: Tensor) -> Tensor:
        return x

    def start_moments(self, mean: Tensor, rows: int, error: Tensor) -> Callable[[], Moments]:
        return lambda: Moments(self, mean, mean, rows, error, error)


def middle_rank(student: Tensor, target: Tensor, route: str) -> Callable[[], Any]:
    """Return a function that launches the kernels for this rank's loss and gradients. route: gram or covariance."""
    plan = make_plan(
        *student.shape, inv_weight=1, var_weight=1, cov_weight=1, gamma=1.0, eps=1e-4, cov_reduction="mean",
        unbiased=False, route=route,
    )  # fmt: skip
    weights = torch.ones(3, dtype=acc_dtype(student), device=student.device)
    grads = student.new_empty(student.shape, dtype=weights.dtype), student.new_empty(student.shape, dtype=weights.dtype)
    ranks = MiddleRank(None, [len(student)] * 3)  # type: ignore[arg-type]
    options = BackwardOptions(True, True, plan)
    return partial(vicreg_ranks_triton, grads, student, target, weights[0], weights, options, ranks)
