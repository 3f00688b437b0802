"""The demo on the processes of torchrun: each learns from its part of a batch, and one reports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Ranks(NamedTuple):
    """The rank of this process, and the number of processes."""

    rank: int = 0
    world: int = 1

    def own_part(self, items: Any) -> Any:
        """Return this rank's part of a batch that all ranks drew alike."""
        return items[self.rank :: self.world]

    def mean(self, value: float) -> float:
        """Average a value over the ranks, all of which must call this."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(total)
        return total.item() / self.world

    def parallel(self, module: nn.Module) -> nn.Module:
        return module if self.world == 1 else DistributedDataParallel(module)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join torchrun's process group, if it started this process, and yield its ranks.

    Clusters set WORLD_SIZE and its siblings in every shell of a job, too. A process that joined there would wait for
    ever.
    """
    world = os.environ.get("WORLD_SIZE") or "1"
    if world == "1" or not dist.is_torchelastic_launched():
        if world != "1":
            print(f"WORLD_SIZE is {world!r}, but torchrun did not start this process: it runs alone.", file=sys.stderr)
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for CPUs, and NCCL for GPUs
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process at once. Python's own exit aborts a rank in about one run of 150.

    DistributedDataParallel leaves gloo's threads running after destroy_process_group (seen in torch 2.14). One that
    frees a tensor of a collective while Python ends finds no interpreter, and C++ terminates the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
