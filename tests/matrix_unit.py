"""A pytest plugin: the interpreter computes with the numbers of a Hopper GPU, where those differ from IEEE's.

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p matrix_unit tests/test_vicreg.py

The matrix unit takes float32 operands as TF32: it ignores their last 13 bits. One addition takes 16 products of 16-bit
operands, or 8 of TF32, and the accumulator. All terms are aligned to the largest, cut toward zero two bits below
float32's last, and their sum is cut to float32. Source: Khattak and Mikaitis, Accurate Models of NVIDIA Tensor Cores
(arXiv 2512.07004). For TF32x3 the compiler's PTX rounds an operand to TF32, takes the rest unrounded, and adds three
products from zero. Divisions and square roots are the fast ones, whose last digit may be off by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

EXTRA = 2  # bits below float32's last to which terms are cut
TERMS = {"TF32": 8, "16 bits": 16}  # that one addition takes together with the accumulator
TF32_BITS = np.uint32(0xFFFFE000)  # sign, exponent and ten bits: TF32
FLOAT32_BITS = np.uint64(0xFFFFFFFFE0000000)  # those of float64's bits that float32 has


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.uint32) & TF32_BITS).view(np.float32)


def round_to_tf32(x: np.ndarray) -> np.ndarray:
    """Rounds to nearest, ties away from zero, as cvt.rna.tf32 does."""
    rounded = (np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000) & TF32_BITS).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def cut_to_float32(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint64) & FLOAT32_BITS).view(np.float64).astype(np.float32)


def multiply(a: np.ndarray, b: np.ndarray, acc: np.ndarray, terms: int) -> np.ndarray:
    """Return acc + a b for operands that fit the unit, which adds `terms` products at a time."""
    with np.errstate(all="ignore"):
        if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(acc).all()):
            return (a.astype(np.float64) @ b.astype(np.float64) + acc).astype(np.float32)
        for start in range(0, a.shape[1], terms):
            left, right = (x.astype(np.float64) for x in (a[:, start : start + terms], b[start : start + terms]))
            if left.any() and right.any():
                products, before = left[:, :, None] * right[None], acc.astype(np.float64)
                _, exponent = np.frexp(np.maximum(np.abs(products).max(1), np.abs(before)))
                unit = exponent - 24 - EXTRA  # frexp's exponent is one above that of the leading bit
                whole = np.trunc(np.ldexp(products, -unit[:, None])).sum(1) + np.trunc(np.ldexp(before, -unit))
                acc = cut_to_float32(np.ldexp(whole, unit))
    return acc


def holds_16_bits(*operands: np.ndarray) -> bool:
    """Return whether all values fit bfloat16, or all fit float16: the interpreter gets both as float32."""
    with np.errstate(all="ignore"):
        bf16 = all((x.view(np.uint32) << np.uint32(16) == 0).all() for x in operands)
        fp16 = all(np.array_equal(x.astype(np.float16).astype(np.float32), x, equal_nan=True) for x in operands)
    return bf16 or fp16


def dot(a: np.ndarray, b: np.ndarray, acc: np.ndarray, precision: str) -> np.ndarray:
    """Return acc + a b in float32 as the compiled kernel computes it."""
    a, b = (np.ascontiguousarray(x, np.float32) for x in (a, b))
    if holds_16_bits(a, b):
        return multiply(a, b, acc, TERMS["16 bits"])
    if precision == "TF32X3":
        (big_a, rest_a), (big_b, rest_b) = (tf32x3_parts(x) for x in (a, b))
        total = multiply(rest_a, big_b, np.zeros_like(acc), TERMS["TF32"])
        total = multiply(big_a, rest_b, total, TERMS["TF32"])
        total = np.where(np.isnan(total), np.float32(0), total)  # infinity less infinity
        return multiply(big_a, big_b, total, TERMS["TF32"]) + acc
    return multiply(cut_to_tf32(a), cut_to_tf32(b), acc, TERMS["TF32"])


def tf32x3_parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    big = round_to_tf32(x)
    with np.errstate(all="ignore"):
        return big, cut_to_tf32(x - big)


def off_by_a_digit(x: np.ndarray) -> np.ndarray:
    """Move a quarter of float32 numbers one last digit up and a quarter down, chosen by their bits."""
    if x.dtype != np.float32:
        return x
    with np.errstate(all="ignore"):
        draw = (np.ascontiguousarray(x).view(np.uint32) * np.uint32(2654435761)) >> np.uint32(30)
        up, down = (np.nextafter(x, np.copysign(np.float32(far), x)) for far in (np.inf, 0))
        moved = np.where(draw == 0, up, np.where(draw == 1, down, x))
    return np.where(np.isfinite(x) & (np.abs(x) >= np.finfo(np.float32).tiny), moved, x)


def fast(exact: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def inexact(self: Any, *operands: TensorHandle) -> TensorHandle:
        out = exact(self, *operands)
        return TensorHandle(off_by_a_digit(out.data), out.dtype)

    return inexact


def on_the_unit(exact: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def create_dot(
        self: Any, a: TensorHandle, b: TensorHandle, acc: TensorHandle, input_precision: Any, most: Any
    ) -> TensorHandle:
        precision = str(input_precision).rpartition(".")[2].upper()
        if acc.data.dtype != np.float32 or precision == "IEEE":
            return exact(self, a, b, acc, input_precision, most)
        return TensorHandle(dot(a.data, b.data, acc.data, precision), acc.dtype.scalar)

    return create_dot


def pytest_configure() -> None:
    InterpreterBuilder.create_dot = on_the_unit(InterpreterBuilder.create_dot)
    for name in ("create_fdiv", "create_sqrt"):
        setattr(InterpreterBuilder, name, fast(getattr(InterpreterBuilder, name)))
