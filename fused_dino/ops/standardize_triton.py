"""Standardised columns on a GPU: the launchers, and the ops that torch's dispatcher knows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .columns import COLUMNS, ROWS, launch_statistics, runs_of
from .dispatch import acc_of, cdiv, launched, rows_of
from .plain import launch

TILE_ELEMENTS, TILE_WIDTH = 2048, 512  # of a tile of rows; the width is the largest


def options_of(dtype: torch.dtype) -> dict[str, Any]:
    """Return the options of every launch.

    Fusing a multiplication and an addition is set explicitly: it rounds once less, and Triton 3.10 changes the default.
    """
    return {"ACC": acc_of(dtype), "num_warps": 4, "enable_fp_fusion": True}


def tile_of(width: int) -> dict[str, int]:
    """Return the tile's rows and columns. Narrow rows fit one tile whole."""
    block = min(TILE_WIDTH, max(16, 1 << (width - 1).bit_length()))
    return {"BLOCK_N": TILE_ELEMENTS // block, "BLOCK_D": block}


class Standardization(NamedTuple):
    """Options of standardize."""

    normalize: bool  # whether rows are divided by their norms first
    eps: float  # added to each deviation
    norm_eps: float  # the smallest norm that divides
    dtype: torch.dtype  # of the result


def launch_statistics_left(
    x: Tensor, weight: Tensor, counts: Tensor, factors: Tensor | None, shift: Tensor, squares: Tensor
) -> None:
    """Do what launch_statistics does, of the rows whose weight is not 0."""
    from ..kernels import standardize as kernels

    rows, width = x.shape
    runs, options = runs_of(rows, width), options_of(squares.dtype)
    means, parts = (squares.new_empty((runs.number, width), dtype=torch.float64) for _ in range(2))
    left = counts.new_empty(runs.number, dtype=torch.int32)
    launch(kernels.standardize_statistics_kernel, (cdiv(width, COLUMNS), runs.number),
        x, factors, weight, counts, means, parts, left, x.stride(0), rows, width, runs.length,
        BLOCK_N=ROWS, BLOCK_D=COLUMNS, **options,
    )  # fmt: skip
    launch(kernels.standardize_merge_kernel, (cdiv(width, 128),),
        means, parts, left, shift, squares, width, runs.number, BLOCK=128, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def standardize_fwd_empty(
    x: Tensor,  # [N, D]
    weight: Tensor | None,  # [N]: rows of weight 0 are left out
    counts: Tensor | None,  # [2]: how many rows are left, and the first of them; None without a weight
    options: Standardization,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the result [N, D], 1 / norm of each row [N] or [0], and the columns' sums of squared deviations [D]."""
    out = x.new_empty(x.shape, dtype=options.dtype)
    return out, out.new_empty(x.shape[0] if options.normalize else 0), out.new_empty(x.shape[1])


def launch_standardize_fwd(
    results: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor | None, counts: Tensor | None,
    config: Standardization,
) -> None:  # fmt: skip
    """Fill the results that standardize_fwd_empty allocated."""
    from ..kernels import standardize as kernels

    (x,) = rows_of(x)
    weight = weight if weight is None else weight.contiguous()
    out, factors, squares = results
    normalize, eps, norm_eps, dtype = config
    rows, width = x.shape
    shift, scale = squares.new_empty(width, dtype=torch.float64), factors if normalize else None
    tile = tile_of(width)
    tiles, options = cdiv(rows, tile["BLOCK_N"]), {**tile, **options_of(dtype)}
    with torch.cuda.device_of(x):
        if normalize:
            launch(kernels.standardize_factors_kernel, (tiles,),
                x, factors, x.stride(0), rows, width, EPS=norm_eps, **options,
            )  # fmt: skip
        if weight is None or counts is None:
            launch_statistics(x, scale, shift, squares)
        else:
            launch_statistics_left(x, weight, counts, scale, shift, squares)
        launch(kernels.standardize_fwd_kernel, (tiles, cdiv(width, tile["BLOCK_D"])),
            x, weight, counts, scale, shift, squares, out, x.stride(0), rows, width, rows - 1, EPS=eps, **options,
        )  # fmt: skip


def standardize_bwd_empty(
    grad: Tensor, x: Tensor, weight: Tensor | None, counts: Tensor | None, out: Tensor, factors: Tensor,
    squares: Tensor, options: Standardization,
) -> Tensor:  # fmt: skip
    """Allocate the gradient of x."""
    return x.new_empty(x.shape)


def launch_standardize_bwd(
    grad_x: Tensor, grad: Tensor, x: Tensor, weight: Tensor | None, counts: Tensor | None, out: Tensor,
    factors: Tensor, squares: Tensor, config: Standardization,
) -> None:  # fmt: skip
    """Fill `grad_x`, which standardize_bwd_empty allocated."""
    from ..kernels import standardize as kernels

    grad, (x,) = grad.contiguous(), rows_of(x)
    weight = weight if weight is None else weight.contiguous()
    rows, width = x.shape
    runs, tile, options = runs_of(rows, width), tile_of(width), options_of(out.dtype)
    totals, products = (squares.new_empty((runs.number, width)) for _ in range(2))
    mean, slope = (squares.new_empty(width) for _ in range(2))
    with torch.cuda.device_of(x):
        launch(kernels.standardize_sums_kernel, (cdiv(width, COLUMNS), runs.number),
            grad, out, totals, products, rows, width, runs.length,
            BLOCK_N=ROWS, BLOCK_D=COLUMNS, **options,
        )  # fmt: skip
        launch(kernels.standardize_finish_kernel, (cdiv(width, 128),),
            totals, products, squares, counts, mean, slope, rows, width, runs.number, rows - 1, BLOCK=128, **options,
        )  # fmt: skip
        launch(kernels.standardize_bwd_kernel, (cdiv(rows, tile["BLOCK_N"]),),
            grad, out, x, weight, counts, factors if config.normalize else None, squares, mean, slope, grad_x,
            x.stride(0), rows, width, rows - 1, EPS=config.eps, NORM_EPS=config.norm_eps, **tile, **options,
        )  # fmt: skip


standardize_fwd = launched("standardize_fwd", standardize_fwd_empty, launch_standardize_fwd)
standardize_bwd = launched("standardize_bwd", standardize_bwd_empty, launch_standardize_bwd)
