"""Sums over the ranks of a process group that autograd and torch.compile see through."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SumOverRanks(torch.autograd.Function):
    """y = sum_r x_r on every rank; the gradient of x_r is the sum of every rank's gradient of y.

    Where every rank computes the same loss from such sums, a rank's gradient is world_size times its share of the full
    batch's; the mean that DDP or FSDP takes over the ranks then gives the full batch's gradient exactly. (So does the
    differentiable all_gather of the usual recipes: do not multiply by the world size again.)
    """

    @staticmethod
    def forward(x: Tensor, group: ProcessGroup) -> Tensor:
        from torch.distributed import _functional_collectives as funcol

        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """sum_r x_r over the ranks of `group`, with a gradient (see SumOverRanks); x itself where group is None."""
    return x if group is None else SumOverRanks.apply(x, group)
