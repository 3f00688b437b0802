"""Column statistics on a GPU: how many runs of rows they take, and their launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import acc_of, cdiv
from .plain import launch
from .tickets import ticket

COLUMNS, ROWS = 32, 64  # of a block
ROWS_A_RUN = 512  # at least: fewer are read sooner than their results are merged
PROGRAMS = 1024  # that fill a GPU with loads in flight


class Runs(NamedTuple):
    """Splits rows into runs, each for programs of its own."""

    number: int
    length: int  # of each but the last

    @property
    def most(self) -> int:
        """The number of runs, rounded up to a power of two, as tiles need."""
        return 1 << (self.number - 1).bit_length()


def runs_of(rows: int, width: int) -> Runs:
    number = min(cdiv(rows, ROWS_A_RUN), cdiv(PROGRAMS, cdiv(width, COLUMNS)))
    length = cdiv(cdiv(rows, number), ROWS) * ROWS
    return Runs(cdiv(rows, length), length)


def launch_statistics(x: Tensor, factors: Tensor | None, shift: Tensor, squares: Tensor) -> None:
    """Fill shift and squares, [D] each. The means are the first row, times its factor, plus shift.

    shift may be float64, for more digits of the means.
    """
    from ..kernels.columns import column_statistics_kernel

    n, d = x.shape
    runs = runs_of(n, d)
    means, parts = (squares.new_empty((runs.number, d), dtype=t) for t in (torch.float64, squares.dtype))
    launch(column_statistics_kernel, (cdiv(d, COLUMNS), runs.number),
        x, factors, means, parts, ticket(x), shift, squares, x.stride(0), n, d, runs.length, runs.number,
        RUNS=runs.most, BLOCK_N=ROWS, BLOCK_D=COLUMNS, ACC=acc_of(squares.dtype), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
