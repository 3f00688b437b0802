"""The tensors that modules compute with now: their parameters, or what a wrapper has put in their place.

In a forward under FSDP, and in a replica of nn.DataParallel, a module has no parameters(): its weights are attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .reference.dtypes import acc_dtype


def live_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield parameters of all submodules, and the tensors that stand in their place."""
    for part in module.modules():
        yield from (p for p in part._parameters.values() if p is not None)
        if not torch.compiler.is_compiling():  # a compiler takes parameters alone
            yield from (x for x in vars(part).values() if isinstance(x, Tensor))


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the dtype to cast a module's input to: that of its first floating-point weight, or None without one."""
    return next((x.dtype for x in live_tensors(module) if x.is_floating_point()), None)


def reach(*tensors: Tensor) -> Tensor:
    """Return a 0 that gives each tensor an exact zero gradient, even if a tensor holds NaN or is a shard.

    It is float32, or float64 if a tensor is.
    """
    local: list[Any] = [getattr(x, "to_local", lambda x=x: x)() for x in tensors]
    zeros = [x.flatten()[:0].sum(dtype=acc_dtype(*tensors)) for x in local]
    return torch.stack(zeros).sum() if zeros else torch.zeros(())
