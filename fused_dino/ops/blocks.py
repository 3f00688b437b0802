"""Blocks of rows, which a CPU's cache holds from one step to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .dispatch import cdiv

CPU_ROWS = 256  # of some thousand columns: what one step makes of them is still in a core's cache for the next


def blocks(x: Tensor, size: int = CPU_ROWS) -> Iterator[slice]:
    """Even blocks of some `size` rows of x, on a CPU; all rows at once where a compiler fuses, and where a launch costs
    more than memory."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        yield slice(None)
        return
    step = max(1, cdiv(x.shape[0], max(1, (x.shape[0] + size // 2) // size)))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def by_rows(function: Callable[..., tuple], outputs: tuple[Tensor, ...], *rows: Tensor, block: int = CPU_ROWS) -> tuple:
    """function(*rows), in blocks written into `outputs`.

    `function` makes each row of its results from the same row of its arguments.
    """
    parts = list(blocks(rows[0], block))
    if len(parts) == 1:
        return tuple(x.to(out.dtype) for x, out in zip(function(*rows), outputs, strict=True))
    for part in parts:
        for out, made in zip(outputs, function(*(x[part] for x in rows)), strict=True):
            out[part] = made
    return outputs
