"""What `aot.py` compiles. An op joins with its generator of cases, listed in `CASES`.

A launch goes through the op's own launcher, on tensors that are never read: so the options, the specialisation of
integers and pointers and the arguments that are None are those of a real launch, and nothing is typed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from fused_dino.ops import cosine_triton

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Case:
    """A call that launches kernels. The first word of its name may select a budget of its own."""

    name: str
    launch: Callable[[], object]


def cosine_cases() -> Iterator[Case]:
    def case(name: str, student: torch.Tensor, teacher: torch.Tensor, *more: object) -> Case:
        return Case(name, partial(cosine_triton.cosine_rows_triton, student, teacher, *more))

    def cases(name: str, student: torch.Tensor, teacher: torch.Tensor, grad_stride: int = 1) -> Iterator[Case]:
        count = student.shape[0]
        rows = student.new_empty(count, grad_stride, dtype=cosine_triton.wide(student, teacher))[:, 0]
        how = "cosine", "sum", count, 1e-12
        yield case(name, student, teacher, None, None, None, *how, False, False)
        yield case(f"{name} with gradient", student, teacher, None, rows[0], None, *how, True, False)
        yield case(f"{name} to student", student, teacher, None, None, rows, *how, True, False)
        yield case(f"{name} weighted to both", student, teacher, rows, rows[0], rows, *how, True, True)

    for width in cosine_triton.CONFIGURATIONS:
        for name, dtype in DTYPES.items():
            x = torch.empty(2, width, dtype=dtype)
            yield from cases(name, x, x)
        bf16, fp32 = (torch.empty(2, width, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        yield from cases("bf16/fp32", bf16, fp32)
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
        yield Case(f"{name}", partial(cosine_triton.cosine_rescale_triton, x, x.new_empty(())))


# A compilation takes a tenth of a second, so every dtype is compiled for every GPU.
CASES = [cosine_cases]
