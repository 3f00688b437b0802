"""Columns standardised over all rows on a GPU: the launchers, and the ops that torch's dispatcher knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.cosine import NORM_EPS
from .columns import COLUMNS, ROWS, launch_statistics, runs_of
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch

ELEMENTS, WIDEST = 2048, 512  # of a tile of the passes over rows


def options_of(dtype: torch.dtype) -> dict[str, Any]:
    """enable_fp_fusion explicitly: it rounds once less, and Triton 3.10 changes the default."""
    return {"ACC": acc_of(dtype), "num_warps": 4, "enable_fp_fusion": True}


def tile_of(width: int) -> dict[str, int]:
    """Whole rows where they are narrow."""
    block = min(WIDEST, max(16, 1 << (width - 1).bit_length()))
    return {"BLOCK_N": ELEMENTS // block, "BLOCK_D": block}


class Standardization(NamedTuple):
    normalize: bool  # rows are divided by their norms first
    eps: float  # added to each deviation
    dtype: torch.dtype  # of the result


def standardize_fwd_empty(x: Tensor, options: Standardization) -> tuple[Tensor, Tensor, Tensor]:
    """The result [N, D], what rows were multiplied by [N] or [0], and the columns' sums of squares about their means
    [D]."""
    out = x.new_empty(x.shape, dtype=options.dtype)
    return out, out.new_empty(x.shape[0] if options.normalize else 0), out.new_empty(x.shape[1])


def launch_standardize_fwd(made: tuple[Tensor, Tensor, Tensor], x: Tensor, how: Standardization) -> None:
    from ..kernels import standardize as kernels

    (x,) = rows_of(x)
    out, factors, squares = made
    normalize, eps, dtype = how
    rows, width = x.shape
    shift, scale = squares.new_empty(width, dtype=torch.float64), factors if normalize else None
    tile = tile_of(width)
    tiles, options = cdiv(rows, tile["BLOCK_N"]), {**tile, **options_of(dtype)}
    with torch.cuda.device_of(x):
        if normalize:
            launch(
                kernels.standardize_factors_kernel,
                (tiles,),
                x,
                factors,
                x.stride(0),
                rows,
                width,
                EPS=NORM_EPS,
                **options,
            )
        launch_statistics(x, None, scale, shift, squares)
        launch(
            kernels.standardize_fwd_kernel,
            (tiles, cdiv(width, tile["BLOCK_D"])),
            x,
            scale,
            shift,
            squares,
            out,
            x.stride(0),
            rows,
            width,
            rows - 1,
            EPS=eps,
            **options,
        )


def standardize_bwd_empty(
    grad: Tensor, x: Tensor, out: Tensor, factors: Tensor, squares: Tensor, options: Standardization
) -> Tensor:
    return x.new_empty(x.shape)


def launch_standardize_bwd(
    grad_x: Tensor, grad: Tensor, x: Tensor, out: Tensor, factors: Tensor, squares: Tensor, how: Standardization
) -> None:
    from ..kernels import standardize as kernels

    grad, (x,) = grad.contiguous(), rows_of(x)
    rows, width = x.shape
    runs, tile, options = runs_of(rows, width), tile_of(width), options_of(out.dtype)
    totals, along = (squares.new_empty((runs.number, width)) for _ in range(2))
    mean, share = (squares.new_empty(width) for _ in range(2))
    with torch.cuda.device_of(x):
        launch(kernels.standardize_sums_kernel, (cdiv(width, COLUMNS), runs.number),
            grad, out, totals, along, rows, width, runs.length,
            BLOCK_N=ROWS, BLOCK_D=COLUMNS, **options,
        )  # fmt: skip
        launch(
            kernels.standardize_finish_kernel,
            (cdiv(width, 128),),
            totals,
            along,
            squares,
            mean,
            share,
            rows,
            width,
            runs.number,
            rows - 1,
            BLOCK=128,
            **options,
        )
        launch(kernels.standardize_bwd_kernel, (cdiv(rows, tile["BLOCK_N"]),),
            grad, out, x, factors if how.normalize else None, squares, mean, share, grad_x,
            x.stride(0), rows, width, rows - 1, EPS=how.eps, NORM_EPS=NORM_EPS, **tile, **options,
        )  # fmt: skip


standardize_fwd = launched("standardize_fwd", standardize_fwd_empty, launch_standardize_fwd)
standardize_bwd = launched("standardize_bwd", standardize_bwd_empty, launch_standardize_bwd)
