"""Decide whether an error against float64 is too large, for tests and benchmarks alike."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Error(NamedTuple):
    """The largest error of a result, eager's, and the largest that is allowed, all in one unit."""

    largest: float
    eager: float
    allowed: float

    @property
    def too_large(self) -> bool:
        return not self.largest <= self.allowed  # NaN is too large

    def __str__(self) -> str:
        return f"error {self.largest:.2g}, eager's {self.eager:.2g}, allowed {self.allowed:.2g}"


def compare(got: Tensor, eager: Tensor, true: Tensor, unit: Tensor, floor: float) -> Error:
    """Compare a result with float64's. Allow twice eager's error, the floor, and one rounding of the result.

    Args:
        got: The result under test.
        eager: Eager's result. Where it is not finite, its error counts as 0.
        true: The result in float64, finite.
        unit: The size of an error of 1: one number, or one for each element.
        floor: The error that is allowed beside twice eager's.
    """
    if got.shape != true.shape:
        return Error(math.inf, 0.0, 0.0)
    limits = finer(got, eager)
    # To a subnormal number its last step is large.
    rounding = limits.eps * (true.abs().clamp(min=limits.smallest_normal) / unit).max().item()
    eagers = torch.where(eager.isfinite(), (eager.double() - true).abs() / unit, 0).max().item()
    largest = ((got.double() - true).abs() / unit).max().item()
    return Error(largest, eagers, 2 * eagers + floor + rounding)


def finer(got: Tensor, eager: Tensor) -> torch.finfo:
    """Return the limits of the finer of two dtypes. A coarser result than eager's is not allowed more."""
    return min((torch.finfo(x.dtype) for x in (got, eager)), key=lambda limits: limits.eps)
