"""The launch options of the resize kernels: how many taps an axis has, and how much of it one program owns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import acc_dtype
from .dispatch import acc_of, cdiv
from .plain import launch

MAX_COLUMNS = 256  # of the target that a program may own
MAX_SEGMENT = 512  # columns of the source that it holds at a time
ROWS = 8  # that a program owns: it computes the weights of its columns once for all of them


class Axis(NamedTuple):
    """One axis of a resize."""

    size_in: int
    size_out: int
    interpolation: str
    antialias: bool

    @property
    def reach(self) -> float:
        """The distance from its centre, in inputs, within which an output reads."""
        half = 2.0 if self.interpolation == "bicubic" else 1.0
        return half * max(self.size_in / self.size_out, 1) if self.antialias else half

    def taps(self, backward: bool) -> int:
        """Return how many elements of the source an element of the target may sum, at most.

        The backward kernel widens its range by a sixteenth on either side against rounding.
        """
        if backward:
            return math.floor(2 * self.reach * self.size_out / self.size_in + 0.125) + 1
        return math.ceil(self.reach) * 2 + 1 if self.antialias else int(2 * self.reach)


@lru_cache(maxsize=1024)
def tiles(axis: Axis, backward: bool) -> dict[str, int]:
    """Return the tile of a program.

    COLUMNS: the columns of the target that it owns; BLOCK: a power of two that holds them. SEGMENT: a power of two that
    holds the columns of the source that it reads at a time. WHOLE: whether one segment holds all that it reads.
    """
    source, target = (axis.size_out, axis.size_in) if backward else (axis.size_in, axis.size_out)

    def tile(columns: int) -> tuple[float, dict[str, int]]:
        """Return the cost of a width, and the tile."""
        # The first column of the source is rounded down to a multiple of 16, and rounding may add one.
        read = min(source, math.ceil((columns - 1) * source / target) + axis.taps(backward) + 16)
        block, segment = power_of_two(columns), min(power_of_two(read), MAX_SEGMENT)
        turns = cdiv(read, segment)
        # In units of what one column costs in the machine code of sm_90.
        cost = cdiv(target, columns) * (400 + turns * (block + 0.7 * segment))
        return cost, {"COLUMNS": columns, "BLOCK": block, "SEGMENT": segment, "WHOLE": turns == 1}

    heavy = backward and axis.antialias and axis.interpolation == "bicubic"  # weights that would fill the registers
    return min(map(tile, range(16, MAX_COLUMNS // (1 + heavy) + 1, 16)), key=itemgetter(0))[1]


def active_lanes(axis: Axis, tile: dict[str, int]) -> int:
    """Return how many lanes of a warp own a column.

    They are fewer than 32 if the tile has more lanes than columns, or if fewer lanes have fewer conflicts in the 32
    banks of shared memory.
    """

    def words_per_bank(lanes: int) -> int:
        return cdiv(math.ceil((lanes - 1) * axis.size_in / axis.size_out) + 1, 32)

    return min(32, tile["COLUMNS"] * 32 // tile["BLOCK"], key=words_per_bank)


def power_of_two(count: int) -> int:
    """Return the least power of two that is at least `count` and a warp's 32 lanes."""
    return max(32, 1 << (count - 1).bit_length())


def launch_options(
    images: Tensor, size: Sequence[int], interpolation: str, antialias: bool, patch_size: int, backward: bool
) -> tuple[tuple[float, ...], dict[str, Any], tuple[int, int]]:
    """Return the sizes and counts that both kernels take, their options, and the grid.

    Constants of the model are compiled in: as arguments Triton would round them to float32, for float64 too.
    """
    H, W = images.shape[2:]
    h, w = size
    y, x = (Axis(*pair, interpolation, antialias) for pair in ((H, h), (W, w)))
    tile = tiles(x, backward)
    copied = backward and not antialias and (h, w) == (H, W)  # torch copies that gradient, NaN and all
    height, width = (H, W) if backward else (h, w)
    rows = max(1, min(ROWS, images.shape[0]))  # few images with many rows each would leave a GPU idle
    options = {
        "CUBIC": interpolation == "bicubic" and not copied,
        "ANTIALIAS": antialias,
        "PATCH": patch_size,
        "ACC": acc_of(acc_dtype(images)),
        "num_warps": 4 if acc_dtype(images) == torch.float64 else 2,  # 1 would gather by shuffles
        "enable_fp_fusion": True,
        **tile,
    }
    if not backward:
        options["ACTIVE"] = active_lanes(x, tile)
    arguments = (H, W, h, w, rows, H / h, W / w, y.taps(backward), x.taps(backward))
    return arguments, options, (images.shape[0] * cdiv(height, rows), cdiv(width, tile["COLUMNS"]))


def antialias_sums(images: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    """Compute 1 / the sum of the weights of each row and column of the output, [h + w]."""
    from ..kernels.resize import antialias_sums_kernel

    H, W = images.shape[2:]
    h, w = size
    taps = max(Axis(*pair, interpolation, True).taps(False) for pair in ((H, h), (W, w)))
    sums = images.new_empty(h + w, dtype=acc_dtype(images))
    launch(antialias_sums_kernel, (cdiv(max(h, w), 128), 2),
        sums, H, W, h, w, H / h, W / w, taps,
        CUBIC=interpolation == "bicubic", BLOCK=128, ACC=acc_of(sums.dtype), num_warps=2,
    )  # fmt: skip
    return sums
