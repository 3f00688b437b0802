"""Blocks of rows, small enough to stay in a CPU's cache from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .dispatch import cdiv

CPU_ROWS = 256  # of some thousand columns: the result of one step is still in a core's cache for the next


def blocks(x: Tensor, size: int = CPU_ROWS) -> Iterator[slice]:
    """Yield even blocks of about `size` rows of x on a CPU. On a GPU and in compiled code yield all rows at once.

    A compiler fuses the steps, and on a GPU a launch costs more than memory.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        yield slice(None)
        return
    step = max(1, cdiv(x.shape[0], max(1, (x.shape[0] + size // 2) // size)))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def by_rows(function: Callable[..., tuple], outputs: tuple[Tensor, ...], *rows: Tensor, block: int = CPU_ROWS) -> tuple:
    """Return function(*rows), computed in blocks and written into `outputs`.

    Each row of a result depends on the same row of the arguments alone.
    """
    parts = list(blocks(rows[0], block))
    if len(parts) == 1:
        return tuple(x.to(out.dtype) for x, out in zip(function(*rows), outputs, strict=True))
    for part in parts:
        for out, result in zip(outputs, function(*(x[part] for x in rows)), strict=True):
            out[part] = result
    return outputs
