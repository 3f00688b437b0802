"""What `aot.py` compiles. An op joins with its generator of cases, listed in `CASES`.

A launch goes through the op's own launcher, on tensors that are never read. So its options, its specialised integers
and pointers, and its arguments that are None are those of a real launch, and nothing is typed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.middle_rank import middle_rank
from fused_dino import functional as FD
from fused_dino.ops import cosine_triton, resize, standardize_triton, taps, vicreg_triton
from fused_dino.ops.dispatch import cdiv
from fused_dino.ops.vicreg_plan import Plan, make_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Case:
    """A call that launches kernels. The first word of its name may select a budget of its own.

    values: how many numbers of the result one thread makes in a turn of the outermost loop, if its instructions are
        counted. Instructions of lanes that make none are shared out among the others. turns: how many turns that loop
        takes.
    """

    name: str
    launch: Callable[[], object]
    values: float = 0
    turns: int = 1


def cosine_cases() -> Iterator[Case]:
    def case(
        name: str, student: torch.Tensor, teacher: torch.Tensor, *more: Any, index: torch.Tensor | None = None
    ) -> Case:
        options = cosine_triton.RowOptions(*more[3:])
        return Case(name, partial(cosine_triton.cosine_rows.run, student, teacher, index, *more[:3], options))

    def cases(name: str, student: torch.Tensor, teacher: torch.Tensor, grad_stride: int = 1) -> Iterator[Case]:
        count = student.shape[0]
        rows = student.new_empty(count, grad_stride, dtype=cosine_triton.acc_dtype(student, teacher))[:, 0]
        how = "cosine", "sum", count, 1e-12
        yield case(name, student, teacher, None, None, None, *how, False, False)
        yield case(f"{name} with gradient", student, teacher, None, rows[0], None, *how, True, False)
        yield case(f"{name} to student", student, teacher, None, None, rows, *how, True, False)
        yield case(f"{name} weighted to both", student, teacher, rows, rows[0], rows, *how, True, True)

    def indexed(name: str, student: torch.Tensor, teacher: torch.Tensor) -> Iterator[Case]:
        """Each image has half of the rows."""
        count = student.shape[0]
        rows = student.new_empty(count, dtype=cosine_triton.acc_dtype(student, teacher))
        index = torch.empty(2, count // 2, dtype=torch.int64, device=student.device)
        how = "cosine", "sum", count, 1e-12
        yield case(f"{name} indexed", student, teacher, None, None, None, *how, True, False, index=index)
        yield case(f"{name} indexed, weighted", student, teacher, rows, rows[0], rows, *how, True, False, index=index)

    for width in cosine_triton.CONFIGURATIONS:
        for name, dtype in DTYPES.items():
            x = torch.empty(2, width, dtype=dtype)
            yield from cases(name, x, x)
        bf16, fp32 = (torch.empty(2, width, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        yield from cases("bf16/fp32", bf16, fp32)
        for name, dtype in DTYPES.items():
            yield from indexed(name, torch.empty(4, width, dtype=dtype), torch.empty(2, 3, width, dtype=dtype))
        yield from cases("unaligned bf16", bf16[:, 1:], bf16[:, 1:], grad_stride=3)
        for kind in ("mse", "raw"):
            how = kind, "sum", 2, 1e-12
            yield case(f"bf16 {kind}", bf16, bf16, None, fp32[0, 0], None, *how, True, False)
            yield case(f"bf16 {kind} elements", bf16, bf16, None, None, None, kind, "elements", 1, 1e-12, False, False)
            yield case(
                f"bf16 {kind} elements to both", bf16, bf16, None, None, fp32, kind, "elements", 1, 1e-12, True, True
            )
    wide = torch.empty(2, 16384, dtype=torch.bfloat16)  # a loop over columns
    yield from cases("bf16 wide", wide, wide)
    # Past 2 GB AMD's compiler has other loads. A tensor on the meta device takes no memory, and counts as aligned. So
    # many rows are several a program.
    large = torch.empty(2**21, 1024, dtype=torch.bfloat16, device="meta")
    yield from cases("bf16 large", large, large)
    for name, dtype in DTYPES.items():
        x = torch.empty(2, 1024, dtype=dtype)
        yield Case(f"{name}", partial(cosine_triton.cosine_rescale_.run, x, x.new_empty(())))


def resize_cases() -> Iterator[Case]:
    def cases(
        name: str,
        images: torch.Tensor,
        size: tuple[int, int],
        backward: bool = False,
        counted: bool = False,
        **how: object,
    ) -> Iterator[Case]:
        defaults = {"input_range": (-1.0, 1.0), "mean": FD.IMAGENET_MEAN, "std": FD.IMAGENET_STD, "clamp": False}
        defaults |= {"interpolation": "bilinear", "antialias": False, "out_dtype": torch.bfloat16, "patch_size": None}
        options = resize.Options(size, **(defaults | how))
        out = resize.resize_fwd_empty(images, options)
        count: dict[str, Any] = {}
        if counted:  # a row of three channels by all the programs' 64 threads
            columns = taps.tiles(taps.Axis(images.shape[3], size[1], options.interpolation, options.antialias), False)
            count = {"values": 3 * size[1] / (64 * cdiv(size[1], columns["COLUMNS"])), "turns": taps.ROWS}
        yield Case(name, partial(resize.resize_fwd.run, images, options), **count)
        if backward:
            yield Case(f"{name} backward", partial(resize.resize_bwd.run, out, images, options))

    def image(dtype: torch.dtype, side: int, batch: int = 8) -> torch.Tensor:
        return torch.empty(batch, 3, side, side, dtype=dtype, device="meta")

    for name, dtype in {**DTYPES, "u8": torch.uint8}.items():
        x = image(dtype, 256)
        floating, same = dtype.is_floating_point, dtype if dtype.is_floating_point else torch.bfloat16
        yield from cases(f"{name} bilinear", x, (224, 224), floating, dtype != torch.float64, out_dtype=same)
        yield from cases(f"{name} bicubic", x, (224, 224), floating, interpolation="bicubic", out_dtype=same)
        yield from cases(f"{name} antialias", x, (224, 224), floating, antialias=True, out_dtype=same)
        last = x.to(memory_format=torch.channels_last)
        yield from cases(f"last {name}", last, (224, 224), False, dtype != torch.float64, out_dtype=same)
        if dtype != torch.float64:
            yield from cases(f"518 {name}", image(dtype, 512), (518, 518), floating, True, out_dtype=same)
    x = image(torch.float32, 512)
    yield from cases(
        "other shrink", image(torch.float32, 1024), (224, 224), True, antialias=True, interpolation="bicubic"
    )
    yield from cases("patches", x, (224, 224), True, True, patch_size=14)
    yield from cases("clipped", x, (224, 224), True, clamp=True)
    yield from cases("patches clipped", x, (224, 224), True, clamp=True, patch_size=14)
    yield from cases("other odd", torch.empty(2, 3, 250, 333, dtype=torch.bfloat16), (224, 210), True)
    yield from cases("other strided", torch.empty(2, 3, 100, 64)[..., ::2], (56, 14), True)
    # Past 2 GB AMD's compiler has other loads.
    yield from cases("other large", image(torch.float32, 1024, 1024), (224, 224), True)


def vicreg_cases() -> Iterator[Case]:
    def planned(student: torch.Tensor, route: str = "auto") -> Plan:
        return make_plan(
            *student.shape, inv_weight=1, var_weight=1, cov_weight=1, gamma=1.0, eps=1e-4, cov_reduction="mean",
            unbiased=False, route=route,
        )  # fmt: skip

    def cases(name: str, student: torch.Tensor, teacher: torch.Tensor, wanted: tuple[bool, ...]) -> Iterator[Case]:
        plan = planned(student)
        weights = torch.ones(3, dtype=torch.float64) if student.dtype == torch.float64 else None
        made = vicreg_triton.vicreg_fwd_empty(student, teacher, weights, plan)
        saved = vicreg_triton.Saved(*made[4:])
        backward = partial(vicreg_triton.vicreg_bwd.run, student, teacher, made.loss, weights, saved)
        name += f" by {'rows' if plan.gram else 'columns'} of {list(student.shape)}"
        yield Case(name, partial(vicreg_triton.vicreg_fwd.run, student, teacher, weights, plan))
        for both in wanted:
            yield Case(
                f"{name} to {'both' if both else 'student'}",
                partial(backward, vicreg_triton.BackwardOptions(True, both, plan)),
            )

    for rows, width in ((256, 1024), (2048, 1024)):  # by rows with a split product, by columns with a whole one
        for name, dtype in DTYPES.items():
            x = torch.empty(rows, width, dtype=dtype)
            yield from cases(name, x, x, (False,))
    bf16, fp32 = (torch.empty(256, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    yield from cases("bf16/fp32", bf16, fp32, (True,))
    yield from cases("unaligned bf16", bf16[:, 1:], bf16[:, 1:], (False,))
    many = torch.empty(4096, 256, dtype=torch.bfloat16)
    yield from cases("bf16", many, many, ())  # by columns, split
    for shape in ((1024, 4096), (4096, 1024)):  # in the largest tiles, none of which has an end in it
        for name in ("fp32", "bf16", "fp16"):
            x = torch.empty(shape, dtype=DTYPES[name])
            yield from cases(f"large {name}", x, x, (False,))
    for name, dtype in DTYPES.items():
        few, several = torch.empty(96, 512, dtype=dtype), torch.empty(1024, 512, dtype=dtype)
        yield Case(f"{name} over ranks by rows", middle_rank(few, few, "gram"))
        yield Case(f"{name} over ranks by columns", middle_rank(several, several, "covariance"))


def standardize_cases() -> Iterator[Case]:
    def cases(name: str, x: torch.Tensor, normalize: bool = True, weight: torch.Tensor | None = None) -> Iterator[Case]:
        rows = weight, None if weight is None else x.new_empty(2, dtype=torch.int64)
        how = standardize_triton.Standardization(normalize, 1e-5, 1e-12, cosine_triton.acc_dtype(x))
        out, *rest = standardize_triton.standardize_fwd_empty(x, *rows, how)
        yield Case(name, partial(standardize_triton.standardize_fwd.run, x, *rows, how))
        yield Case(f"{name} backward", partial(standardize_triton.standardize_bwd.run, out, x, *rows, out, *rest, how))

    for name, dtype in DTYPES.items():
        x = torch.empty(1024, 1024, dtype=dtype)  # more than one run of rows
        yield from cases(name, x)
        weighted = f"{name} weighted" if name == "fp64" else f"weighted {name}"
        yield from cases(weighted, x, weight=torch.empty(1024, dtype=cosine_triton.acc_dtype(x)))
    bf16 = torch.empty(16, 1024, dtype=torch.bfloat16)
    yield from cases("bf16 as they are", bf16, False)
    yield from cases("unaligned bf16", bf16[:, 1:])


# A compilation takes some tenths of a second, so every dtype is compiled for every GPU.
CASES = [cosine_cases, resize_cases, standardize_cases, vicreg_cases]
