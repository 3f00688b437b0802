"""Checks of arguments: each returns what the op needs, or raises an error that names the argument and what would do."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

LARGEST = sys.float_info.max
SMALLEST = 1e-30  # divisor in float32 whose quotients do not overflow
RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))  # that images come in
TOLERATED = 0.01  # of a batch's values outside of its range, as a decoder overshoots
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {'a nested tensor' if x.is_nested else f'layout {x.layout}'}")


def check_floating(name: str, x: Any) -> None:
    check_tensor(name, x)
    if x.dtype not in FLOATING:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_matching(student: Any, target: Any) -> None:
    """Check two floating tensors [..., D] of one shape on one device, with D of at least 1."""
    check_floating("student", student)
    check_floating("target", target)
    if student.ndim < 1 or student.shape[-1] < 1:
        raise ValueError(f"student must be [..., D] with D of at least 1, got shape {list(student.shape)}")
    if student.shape != target.shape:
        raise ValueError(f"target must have the student's shape {list(student.shape)}, got {list(target.shape)}")
    if student.device != target.device:
        raise ValueError(f"target must be on the student's device {student.device}, got {target.device}")


def check_index(index: Any, student: Any, target: Any) -> None:
    """Check a student [B, M, D], a target [B, N, D], and the index [B, M] of the rows of target that student meets."""
    check_floating("student", student)
    check_floating("target", target)
    check_tensor("index", index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if student.ndim != 3 or student.shape[-1] < 1:
        raise ValueError(f"student must be [B, M, D] with an index, and D at least 1, got shape {list(student.shape)}")
    batch, rows, width = student.shape
    if target.ndim != 3 or target.shape[0] != batch or target.shape[2] != width:
        raise ValueError(f"target must be [{batch}, N, {width}] with an index, got shape {list(target.shape)}")
    if index.shape != student.shape[:2]:
        raise ValueError(f"index must be [{batch}, {rows}], one for each row of student, got {list(index.shape)}")
    if not student.device == target.device == index.device:
        raise ValueError(
            f"index must be on the device of student and target, got {index.device} with {student.device} and "
            f"{target.device}"
        )
    if rows and not target.shape[1]:
        raise ValueError(f"target must have the rows that index names, got shape {list(target.shape)}")
    if target.requires_grad:
        raise ValueError("target requires a gradient, which is not computed with an index; give target.detach()")


def check_positions(index: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Check the values of an index, except those of rows whose weight is 0."""
    outside = (index < 0) | (index >= target.shape[1])
    outside = outside if weight is None else outside & (weight != 0)
    if outside.any():
        raise ValueError(
            f"index must be from 0 to {target.shape[1] - 1}, target's last position, got {index[outside][0].item()}"
        )


def check_weight(weight: Any, student: Tensor) -> Tensor | None:
    """Return the weight expanded to one number per row."""
    if weight is None:
        return None
    check_tensor("weight", weight)
    rows = student.shape[:-1]
    if weight.is_complex():
        raise ValueError(f"weight must be real, got {weight.dtype}")
    if weight.device != student.device:
        raise ValueError(f"weight must be on the student's device {student.device}, got {weight.device}")
    if weight.requires_grad:
        raise ValueError("weight requires a gradient, which this loss does not compute; give weight.detach()")
    try:
        return weight.expand(rows)
    except RuntimeError:
        raise ValueError(f"weight must broadcast to the rows {list(rows)}, got shape {list(weight.shape)}") from None


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(choices)}")
    return value


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_number(name: str, value: Any, minimum: float = -math.inf) -> float:
    if not is_number(value) or value < minimum:
        bound = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return float(value)


def check_scalar(name: str, value: Any, device: torch.device) -> float | Tensor:
    """Return a number, or a scalar tensor on `device` that requires no gradient."""
    if not isinstance(value, Tensor):
        return check_number(name, value)
    unreal = value.is_complex() or value.dtype == torch.bool
    if value.ndim or unreal or value.requires_grad or value.device != device:
        raise ValueError(
            f"{name} must be a number or a real scalar tensor on {device} without a gradient, got {value.dtype} of "
            f"shape {list(value.shape)} on {value.device}, requires_grad={value.requires_grad}"
        )
    return value


def check_group(group: Any, auto: bool = False) -> None:
    """Check a process group or None. auto: whether the word "auto" is accepted too."""
    if group is None or (auto and isinstance(group, str) and group == "auto"):
        return
    if auto and isinstance(group, str):
        raise ValueError(f"group is {group!r}; use 'auto', None or a ProcessGroup")
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        others = "'auto', None" if auto else "None"
        raise TypeError(f"group must be {others} or a torch.distributed.ProcessGroup, got {type(group).__name__}")


def check_images(images: Any, name: str = "images") -> None:
    check_tensor(name, images)
    if images.dtype not in (*FLOATING, torch.uint8):
        raise ValueError(f"{name} must be float16, bfloat16, float32, float64 or uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must be [B, 3, H, W], got shape {list(images.shape)}")
    if images.shape[2] < 1 or images.shape[3] < 1:
        raise ValueError(f"{name} must have at least one pixel, got shape {list(images.shape)}")


def is_int(value: Any, minimum: int = 1) -> bool:
    """Whether a value is an int of Python, numpy or a traced shape, and no bool."""
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool) and bool(value >= minimum)  # type: ignore[operator]


def check_int(name: str, value: Any, minimum: int = 1) -> int:
    if not is_int(value, minimum):
        kind = "a positive int" if minimum == 1 else f"an int of at least {minimum}"
        raise ValueError(f"{name} must be {kind}, got {value!r}")
    return plain_int(value)


def plain_int(value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else int(value)


def check_size(size: Any, name: str = "size") -> tuple[int, int]:
    """Return (h, w). An int is a square."""
    several = isinstance(size, Sequence) and not isinstance(size, (str, bytes))
    pair = tuple(size) if several else (size, size)
    if len(pair) != 2 or not all(map(is_int, pair)):
        raise ValueError(f"{name} must be a positive int or two of them (h, w), got {size!r}")
    return plain_int(pair[0]), plain_int(pair[1])


def check_patch_size(patch_size: Any, size: tuple[int, int]) -> int | None:
    if patch_size is None:
        return None
    if not is_int(patch_size):
        raise ValueError(f"patch_size must be None or a positive int, got {patch_size!r}")
    patch_size = plain_int(patch_size)
    if size[0] % patch_size or size[1] % patch_size:
        raise ValueError(f"patch_size must divide size {size}, got {patch_size}")
    return patch_size


def check_range(input_range: Any, dtype: torch.dtype) -> tuple[float, float]:
    """Return (low, high). None means -1..1 for floats and 0..255 for uint8."""
    if input_range is None:
        return (0.0, 255.0) if dtype == torch.uint8 else (-1.0, 1.0)
    low, high = check_numbers("input_range", input_range, 2)
    if not 0 < high - low <= LARGEST:
        raise ValueError(f"input_range must be (low, high) with low < high, of a finite width, got {input_range!r}")
    return low, high


def check_values(name: str, images: Tensor, input_range: tuple[float, float]) -> str:
    """Describe how images lie in the range. Values outside of it, or in one half of it alone, raise ValueError."""
    low, high = input_range
    least, most = (x.item() for x in images.double().aminmax()) if images.numel() else (low, high)
    outside = ((images < low) | (images > high)).double().mean().item() if images.numel() else 0.0
    said = f"{name} has values from {least:.4g} to {most:.4g} and input_range is ({low:g}, {high:g})"
    fitting = [r for r in RANGES if r != input_range and r[0] <= least and most <= r[1]]
    hint = f"; input_range=({fitting[0][0]:g}, {fitting[0][1]:g}) would fit" if fitting else ""
    if not math.isfinite(most - least):
        raise ValueError(f"{said}: values must be finite")
    if outside > TOLERATED:
        raise ValueError(f"{said}: {outside:.1%} of them lie outside{hint}")
    if images.numel() and not least < (low + high) / 2 < most:
        raise ValueError(f"{said}: all of them lie in one half of it{hint}")
    return f"{said}: {outside:.1%} of them lie outside"


def check_scale(std: tuple[float, ...], input_range: tuple[float, float]) -> tuple[float, ...]:
    """Return std, after checking that float32 can divide by its product with the width of input_range."""
    width = input_range[1] - input_range[0]
    if not all(SMALLEST <= width * s <= 1 / SMALLEST for s in std):
        raise ValueError(
            f"std times input_range's width, {width:g}, must be between {SMALLEST:g} and {1 / SMALLEST:g}, got {std}"
        )
    return std


def check_triple(name: str, values: Any, positive: bool = False) -> tuple[float, float, float]:
    r, g, b = check_numbers(name, values, 3)
    if positive and min(r, g, b) <= 0:
        raise ValueError(f"{name} must be positive, got {values!r}")
    return r, g, b


def check_floating_dtype(name: str, dtype: Any) -> torch.dtype | None:
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(f"{name} must be None, float16, bfloat16, float32 or float64, got {dtype!r}")
    return dtype


def check_numbers(name: str, values: Any, count: int) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or len(values) != count or not all(map(is_number, values)):
        raise ValueError(f"{name} must be {count} finite numbers, got {values!r}")
    return tuple(map(float, values))


def is_number(x: Any) -> bool:
    """Whether x is finite as a float. torch.compile traces comparisons of a symbolic float, but not math.isfinite."""
    if type(x) is float:
        return -math.inf < x < math.inf
    if not isinstance(x, Real) or isinstance(x, bool):
        return False
    return -LARGEST <= x <= LARGEST if isinstance(x, int | Fraction) else -math.inf < float(x) < math.inf
