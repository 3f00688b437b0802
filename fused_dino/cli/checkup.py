"""Each op once on each backend, against its reference."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import functional as FD
from ..backend import triton_obstacle
from ..registry import OPS

LARGEST_ERROR = 1e-3  # of the largest value


def checked(op: str, device: str) -> dict[str, str]:
    """Return for each backend that can run the op whether it agrees with the reference, or what it raised."""
    backends = [name for name in ("torch", "triton") if getattr(OPS[op], name) is not None]
    if triton_obstacle(torch.empty(0, device=device)):
        backends = [name for name in backends if name != "triton"]
    expected = value_and_gradient(op, device, "reference")
    return {backend: verdict(op, device, backend, expected) for backend in backends}


def verdict(op: str, device: str, backend: str, expected: list[Tensor]) -> str:
    try:
        actual = value_and_gradient(op, device, backend)
    except Exception as error:
        return f"raises {type(error).__name__}: {' '.join(str(error).split())}"[:300]
    pairs = zip(actual, expected, strict=True)
    errors = [float((a - e).abs().max() / e.abs().max().clamp(min=1e-30)) for a, e in pairs]
    return "agrees" if all(error <= LARGEST_ERROR for error in errors) else f"is wrong by {max(errors):.2g}"


def value_and_gradient(op: str, device: str, backend: str) -> list[Tensor]:
    function = getattr(FD, op)
    generator = torch.Generator().manual_seed(0)
    more: tuple[Any, ...]
    if "images" in inspect.signature(function).parameters:
        first, more = torch.rand(1, 3, 20, 24, generator=generator), (14,)
    else:
        first = torch.randn(5, 24, generator=generator)
        more = (torch.randn(5, 24, generator=generator).to(device),)
    first = first.to(device).requires_grad_()
    out = function(first, *more, backend=backend)
    value = out if isinstance(out, Tensor) else out[0]
    return [value.detach(), torch.autograd.grad(value.sum(), first)[0]]
