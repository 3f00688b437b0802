"""Functional collectives over the ranks of a process group, which torch.compile can trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SumOverRanks(torch.autograd.Function):
    """The sum y = sum_r x_r on every rank. The gradient of x_r is the sum of every rank's gradient of y.

    Every rank computes the same loss from such sums, so its gradient is world_size times its part of the full batch's.
    The mean that DDP or FSDP takes over the ranks then gives the full batch's gradient exactly. The seed's
    differentiable all_gather does so too: do not multiply by the world size again.
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
    """Sum x over the ranks of `group`, with a gradient (see SumOverRanks), or return x where group is None."""
    return x if group is None else SumOverRanks.apply(x, group)


def start_all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin all_reduce, whose result is there after wait()."""
    from torch.distributed import _functional_collectives as funcol

    return funcol.all_reduce(x.contiguous(), "sum", group)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """Sum x over the ranks, without a gradient."""
    return wait(start_all_reduce(x, group))


def start_all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Begin all_gather, whose result is there after wait()."""
    from torch.distributed import _functional_collectives as funcol

    # Newer torch calls it all_gather_single, and warns of the name that torch 2.11 knows.
    gather = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
    return gather(x.contiguous(), 0, group)


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate every rank's x [n, ...] to [world_size * n, ...], without a gradient."""
    return wait(start_all_gather(x, group))


def wait(x: Tensor) -> Tensor:
    """Return x when its collective is done. The GPU waits for it; the host does not."""
    from torch.distributed import _functional_collectives as funcol

    return funcol.wait_tensor(x)


def all_counts(count: int, device: torch.device, group: ProcessGroup) -> list[int]:
    """Return every rank's `count` as Python ints.

    No GPU takes part if the group has a backend for the CPU: init_process_group without a backend sets up gloo next to
    NCCL. Otherwise the host waits for the device once.
    """
    from torch.distributed import get_backend_config

    if "cpu:" in get_backend_config(group):
        device = torch.device("cpu")
    return all_gather(torch.tensor([count], device=device), group).tolist()


def start_gather_rows(x: Tensor, counts: list[int], group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to gather the rows of all ranks, counts[r] of rank r, and return a function that waits for them.

    They are padded to the largest count in transit.
    """
    most = max(counts)
    if len(x) < most:
        x = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
    gathered = start_all_gather(x, group)

    def rows() -> Tensor:
        every = wait(gathered)
        if min(counts) == most:
            return every
        parts = every.unflatten(0, (len(counts), most))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return rows


def default_group() -> ProcessGroup | None:
    """Return the default process group if torch.distributed is initialised with more than one process, else None."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def shares_buffers() -> bool:
    """Return whether this runs in a forward of DistributedDataParallel that broadcasts the first rank's buffers."""
    wrapper = DistributedDataParallel._active_ddp_module
    return wrapper is not None and wrapper.broadcast_buffers


def group_of(name: str) -> ProcessGroup:
    """Return the process group of a name: torch's dispatcher passes strings, and no groups."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]


def warn_if_unsynchronised(module: nn.Module) -> None:
    """Warn once where several processes train a module whose gradients nothing brings together."""
    if torch.compiler.is_compiling() or getattr(module, "_warned_unsynchronised", False):
        return
    if is_unsynchronised(module):
        module._warned_unsynchronised = True  # type: ignore[assignment]
        warnings.warn(
            "loss_dict runs outside of any wrapper, so that each process has gradients of its own: put the module into "
            "the model that DistributedDataParallel wraps, or wrap it and call wrapped(z_text, x_img, as_dict=True); "
            "group=None says that it is this process's alone",
            stacklevel=3,
        )


def is_unsynchronised(module: nn.Module) -> bool:
    """Return whether several processes take gradients outside of DDP's forward and without sharded parameters."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and torch.is_grad_enabled()):
        return False
    if DistributedDataParallel._active_ddp_module is not None:
        return False
    # FSDP of both kinds marks the modules that it manages, and DeepSpeed the parameters.
    if any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules()):
        return False
    return any(p.requires_grad and not hasattr(p, "ds_id") for p in module.parameters())
