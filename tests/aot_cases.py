"""What `aot.py` compiles. An op joins with its generator of cases, listed in `CASES`.

A launch goes through the op's own launcher, on tensors that are never read: so the options, the specialisation of
integers and pointers and the arguments that are None are those of a real launch, and nothing is typed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from fused_dino.ops import cosine, vicreg_triton
from fused_dino.ops.vicreg_plan import make_plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Case:
    """A call that launches kernels. The first word of its name may select a budget of its own."""

    name: str
    launch: Callable[[], object]


def cosine_cases() -> Iterator[Case]:
    def cases(name: str, student: torch.Tensor, teacher: torch.Tensor, grad_stride: int = 1) -> Iterator[Case]:
        saved = cosine.cosine_fwd_fake(student, teacher, 1e-12)
        grad = saved[0].new_empty(len(student), grad_stride)[:, 0]
        backward = partial(cosine.cosine_bwd_triton, student, teacher, *saved, grad, 1e-12)
        yield Case(name, partial(cosine.cosine_fwd_triton, student, teacher, 1e-12))
        yield Case(f"{name} to student", partial(backward, True, False))
        yield Case(f"{name} to both", partial(backward, True, True))

    for width in cosine.CONFIGURATIONS:
        for name, dtype in DTYPES.items():
            x = torch.empty(2, width, dtype=dtype)
            yield from cases(name, x, x)
        bf16, fp32 = (torch.empty(2, width, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
        yield from cases("bf16/fp32", bf16, fp32)
        yield from cases("unaligned bf16", bf16[:, 1:], bf16[:, 1:], grad_stride=3)
    # Past 2 GB AMD's compiler has other loads. A tensor on the meta device takes no memory, and counts as aligned.
    large = torch.empty(2**21, 1024, dtype=torch.bfloat16, device="meta")
    yield from cases("bf16 large", large, large)


def vicreg_cases() -> Iterator[Case]:
    def cases(name: str, student: torch.Tensor, teacher: torch.Tensor, wanted: tuple[bool, ...]) -> Iterator[Case]:
        plan = make_plan(
            *student.shape, inv_weight=1, var_weight=1, cov_weight=1, gamma=1.0, eps=1e-4, cov_reduction="mean",
            unbiased=False, route="auto",
        )  # fmt: skip
        made = vicreg_triton.vicreg_fwd_fake(student, teacher, *plan)
        backward = partial(vicreg_triton.vicreg_bwd_triton, student, teacher, *made[3:], *made[:3], True)
        name += f" by {'rows' if plan.gram else 'columns'} of {list(student.shape)}"
        yield Case(name, partial(vicreg_triton.vicreg_fwd_triton, student, teacher, *plan))
        for both in wanted:
            yield Case(f"{name} to {'both' if both else 'student'}", partial(backward, both, *plan))

    for rows, width in ((256, 1024), (2048, 1024)):  # by rows with a split product, by columns with a whole one
        for name, dtype in DTYPES.items():
            x = torch.empty(rows, width, dtype=dtype)
            yield from cases(name, x, x, (False,))
    bf16, fp32 = (torch.empty(256, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    yield from cases("bf16/fp32", bf16, fp32, (True,))
    yield from cases("unaligned bf16", bf16[:, 1:], bf16[:, 1:], (False,))
    many = torch.empty(4096, 256, dtype=torch.bfloat16)
    yield from cases("bf16", many, many, ())  # by columns, split


# A compilation takes some tenths of a second, so every dtype is compiled for every GPU.
CASES = [cosine_cases, vicreg_cases]
