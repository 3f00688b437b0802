"""Collectives over the ranks of a process group: functional ones, which torch.compile sees through."""

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
        return all_reduce(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.apply(grad, ctx.group), None


def sum_over_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """sum_r x_r over the ranks of `group`, with a gradient (see SumOverRanks); x itself where group is None."""
    return x if group is None else SumOverRanks.apply(x, group)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """sum_r x_r, without a gradient."""
    from torch.distributed import _functional_collectives as funcol

    return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), "sum", group))


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Every rank's x [n, ...] one after the other: [world_size * n, ...], without a gradient."""
    from torch.distributed import _functional_collectives as funcol

    # Newer torch calls it all_gather_single, and warns of the name that torch 2.11 knows.
    gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    return funcol.wait_tensor(gather(x.contiguous(), 0, group))


def all_counts(count: int, device: torch.device, group: ProcessGroup) -> list[int]:
    """Every rank's `count`, as numbers of the host.

    Where the group has a backend for the CPU (init_process_group without a backend gives it gloo beside NCCL) no GPU
    takes part. Otherwise the host waits for the device once.
    """
    from torch.distributed import get_backend_config

    if "cpu:" in get_backend_config(group):
        device = torch.device("cpu")
    return all_gather(torch.tensor([count], device=device), group).tolist()


def gather_rows(x: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """The rows of all ranks in their order, of which rank r brings counts[r]: padded to the most for the journey."""
    most = max(counts)
    padded = x.new_zeros(most, *x.shape[1:])
    padded[: len(x)] = x
    parts = all_gather(padded, group).unflatten(0, (len(counts), most))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def group_of(name: str) -> ProcessGroup:
    """The group of that name: what a dispatcher's op can be given is a string."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]
