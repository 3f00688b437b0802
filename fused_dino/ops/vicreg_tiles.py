"""The tiles of VICReg's products: their sizes, their operands, and how they fit a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import acc_of, cdiv

PROGRAMS = 132  # that an H100 runs at once, one a multiprocessor
HALF = (torch.bfloat16, torch.float16)
TILES = (128, 64)
FLOAT64 = {"TILE": 32, "BLOCK_K": 16, "PLANES_K": 16, "num_warps": 2}
PIECE = 32  # rows and columns of the product that one program finishes
PAD = 128  # rows and columns to which planes are padded, so that no tile of them has an end in it
GROUP = 8  # tiles of the gradient that run together


class Limits(NamedTuple):
    """The tiles that fit a GPU. On all but Hopper larger tiles would not leave enough registers."""

    tile: int  # the largest side
    memory: int  # bytes of shared memory for the steps of a product
    spills: tuple[torch.dtype, ...] = ()  # in which the compiler spills registers so that more programs run at once


HOPPER, ELSEWHERE = Limits(128, 227 * 1024, (torch.float64,)), Limits(64, 64 * 1024)
AMPERE = Limits(64, 64 * 1024, (torch.float32, torch.float64))
BLACKWELL = Limits(64, 99 * 1024, (torch.float32, torch.float64))
LIMITS = {8: AMPERE, 9: HOPPER, 10: BLACKWELL, 12: AMPERE}  # by a GPU's major version; 12 has as little memory


@cache
def limits_of(device: torch.device) -> Limits:
    if device.type != "cuda":
        return HOPPER
    major = 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
    return LIMITS.get(major, ELSEWHERE)


def registers_on(device: torch.device, dtype: torch.dtype, most: int) -> dict[str, Any]:
    """Return the option of a launch that lets the compiler use this many registers of a thread before it spills any."""
    return {"maxnreg": most} if dtype in limits_of(device).spills else {}


def planes_of_products(dtype: torch.dtype) -> int:
    """Return the planes of products: one for float64, three for float32, or two if torch allows TF32, which is coarser.

    AMD has float32 products. fp32_precision follows every way to set TF32; reading allow_tf32 raises once it is set.
    """
    if dtype == torch.float64:
        return 1
    return 2 if torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip else 3


def is_raw(student: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows can be multiplied as they are: 16 bits, in whole vectors."""
    aligned = not (student.stride(0) % 8 or student.shape[1] % 16 or student.data_ptr() % 16)
    return student.dtype in HALF and dtype == torch.float32 and aligned and student.stride(1) == 1


def padded(size: int) -> int:
    return cdiv(size, PAD) * PAD


def planes_in(x: Tensor, width: int) -> int:
    """Return how many planes of [N, width] x has: none if it is empty."""
    return x.numel() and x.shape[1] // padded(width)


def depth_of(tile: int, tiles: int, memory: int) -> int:
    """Return the depth of a step: two steps of so many tiles of 16 bits must fit."""
    return next((depth for depth in (128, 64, 32) if 4 * tiles * tile * depth <= memory), 16)


def is_whole(student: Tensor, steps: dict[str, Any]) -> bool:
    """Whether every tile of the student is full."""
    return not any(size % part for size in student.shape for part in (steps["TILE"], steps["BLOCK_K"]))


@cache
def operands(student: torch.dtype, dtype: torch.dtype, raw: bool) -> dict[str, Any]:
    """Return the options of a product. enable_fp_fusion is set explicitly: it rounds once less, and Triton 3.10 changes
    the default. The interpreter has no product of 16 bits."""
    import triton
    import triton.language as tl

    own = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(student, tl.bfloat16)
    interpret = triton.knobs.runtime.interpret
    plane = tl.float32 if interpret else tl.bfloat16
    return {
        "RAW": raw,
        "OPERAND": tl.float32 if interpret else own,
        "PLANE": tl.float64 if dtype == torch.float64 else plane,
        "ACC": acc_of(dtype),
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def split(size: int, depth: int, tiles: int, step: int) -> tuple[int, int]:
    """Chooses the splits of a product [..., size] of so many tiles, and the depth of each but the last."""
    splits = max(1, min(PROGRAMS // tiles, depth // size, depth // (2 * step)))
    depth_a_split = cdiv(cdiv(depth, splits), step) * step
    return cdiv(depth, depth_a_split), depth_a_split


@cache
def steps_of(limits: Limits, many: bool, raw: int, planes: int) -> dict[str, Any]:
    """Choose the side of tiles, which is larger if there are many of them, and the depth of a step.

    A step has so many tiles of rows as they are, or so many of planes.
    """
    tile = min(TILES[0] if many else TILES[1], limits.tile)
    depths = {"BLOCK_K": depth_of(tile, raw, limits.memory), "PLANES_K": depth_of(tile, planes, limits.memory)}
    return {"TILE": tile, **depths, "num_warps": tile // 16}
