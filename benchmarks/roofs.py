"""Measure the machine's roofs in the run that they are compared with: a copy, and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from .measure import cold, enqueue, host_sampler

Roofs = dict[str, float]  # "copy": bytes a second, read and written; a precision: FLOP a second

CPU_COPY, GPU_COPY = 2**28, 2**30  # bytes: several times any cache
CPU_SIDE, GPU_SIDE = 1536, 8192  # of the square matrices
DTYPES = {"IEEE": torch.float32, "TF32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def measure_roofs(device: str, precisions: set[str]) -> Roofs:
    roofs = {"copy": copy_speed(device)}
    side = GPU_SIDE if device == "cuda" else CPU_SIDE
    for precision in sorted(precisions):
        a, b = (torch.randn(side, side, device=device, dtype=DTYPES[precision]) for _ in range(2))
        with matrix_precision(precision == "TF32"):
            roofs[precision] = 2 * side**3 / seconds(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    return roofs


def copy_speed(device: str) -> float:
    source = torch.randn((GPU_COPY if device == "cuda" else CPU_COPY) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / seconds(lambda: target.copy_(source), device)


def seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        return cold(call, enqueue(call))
    sample = host_sampler(call)
    return median([sample()["wall"] for _ in range(7)])


@contextmanager
def matrix_precision(tf32: bool) -> Iterator[None]:
    """Let float32 matrix products use TF32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def of_the_roof(seconds: float, bytes: float, flops: float, precision: str, roofs: Roofs) -> tuple[float, str]:
    """Return the share of the nearer roof and its name, "copy" or "matrix"."""
    shares = {"copy": bytes / seconds / roofs["copy"], "matrix": flops / seconds / roofs.get(precision, float("inf"))}
    name = max(shares, key=shares.__getitem__)
    return shares[name], name
