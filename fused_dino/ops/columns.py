"""Column statistics on a GPU: how many runs of rows they take, and their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import acc_of, cdiv
from .plain import launch

COLUMNS, ROWS = 32, 64  # of a block
ROWS_A_RUN = 512  # at least: fewer are read sooner than a second launch starts
PROGRAMS = 1024  # that fill a GPU with loads in flight


class Runs(NamedTuple):
    """Splits rows into runs, each for programs of its own."""

    number: int
    length: int  # of each but the last


def runs_of(rows: int, width: int) -> Runs:
    number = min(cdiv(rows, ROWS_A_RUN), cdiv(PROGRAMS, cdiv(width, COLUMNS)))
    length = cdiv(cdiv(rows, number), ROWS) * ROWS
    return Runs(cdiv(rows, length), length)


def launch_statistics(
    x: Tensor, other: Tensor | None, factors: Tensor | None, shift: Tensor, squares: Tensor
) -> Tensor | None:
    """Fills shift and squares, [D] each -> the sums of (x - other)^2 by runs and columns.

    The means are the first row, times its factor, plus shift, which may be float64 to hold more of them.
    """
    from ..kernels import columns as kernels

    n, d = x.shape
    runs = runs_of(n, d)
    errors = None if other is None else squares.new_empty((runs.number, d))
    stride = 0 if other is None else other.stride(0)
    means, parts = shift, squares
    if runs.number > 1:
        means, parts = (squares.new_empty((runs.number, d), dtype=t) for t in (torch.float64, squares.dtype))
    options: dict[str, Any] = {"ACC": acc_of(squares.dtype), "num_warps": 4, "enable_fp_fusion": True}
    launch(kernels.column_statistics_kernel, (cdiv(d, COLUMNS), runs.number),
        x, other, factors, means, parts, errors, x.stride(0), stride, n, d, runs.length,
        BLOCK_N=ROWS, BLOCK_D=COLUMNS, **options,
    )  # fmt: skip
    if runs.number > 1:
        launch(
            kernels.column_merge_kernel,
            (cdiv(d, 128),),
            means,
            parts,
            shift,
            squares,
            n,
            d,
            runs.length,
            runs.number,
            BLOCK=128,
            **options,
        )
    return errors
