"""Run one small case of every variant of a kernel, by Triton alone, for a memory checker to watch.

    compute-sanitizer python3 -m benchmarks.exercise [--seconds S]

Each case is named before it runs, and ends before the next one, so that a finding of the checker belongs to the case
above it. The exit status is 0, or OUT_OF_TIME where cases are left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fused_dino import functional as FD

from . import session
from .middle_rank import middle_rank
from .roofs import matrix_precision
from .smoke import OUT_OF_TIME

Case = tuple[str, Callable[[], object]]
F64, F32, BF16, F16, U8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8
MANY_ROWS = 4200  # a program takes several of so many


def cases(device: str) -> list[Case]:
    """Return the cases, the most telling of each op first and the ops by turns, since a checker may run out of time."""
    ops = [list(of(device)) for of in (cosine, resize, vicreg, standardize)]
    turns = [(i / len(found), case) for found in ops for i, case in enumerate(found)]
    return [case for _, case in sorted(turns, key=lambda turn: turn[0])]


def gradients(call: Callable[..., Tensor], *inputs: Tensor, grads: int = 1, **options: Any) -> object:
    """Run the backward to the first inputs, `grads` in number, or the forward alone. No value of grad_output is 1."""
    leaves = [x.detach().requires_grad_(i < grads) for i, x in enumerate(inputs)]
    out = call(*leaves, backend="triton", **options)
    if not grads:
        return out
    grad_output = torch.linspace(0.5, 1.5, out.numel() + 1, dtype=out.dtype, device=out.device)[1:].view(out.shape)
    return torch.autograd.grad(out, leaves[:grads], grad_output)


def normal(device: str, *shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def cosine(device: str) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, ...], dtype: torch.dtype, loss: Any = FD.cosine_loss, **options: Any) -> Case:
        inputs = [normal(device, *shape, dtype=dtype) for _ in range(2)]
        sizes = " x ".join(map(str, shape))
        return f"{loss.__name__} {sizes} {dtype}, {name}", partial(gradients, loss, *inputs, **options)

    yield case("to both", (5, 200), BF16, grads=2)
    yield case("programs of several rows", (MANY_ROWS, 40), BF16)
    weight, alpha = torch.linspace(0.5, 1, 5, device=device), torch.tensor(0.3, device=device)
    yield case("weights and a scale", (5, 1000), F32, weight=weight, scale=alpha)
    for width in (1000, 3000, 5000):  # each of the blocks, and a loop over the widest
        yield case("to student", (5, width), F32)
        yield case("to both", (5, width), BF16, grads=2)
    yield case("a value a row", (5, 200), F64, reduction="none", grads=2)
    elements = partial(case, loss=FD.mse_loss, reduction="none", grads=2)
    yield elements("a value an element", (5, 200), F32)
    yield elements("a value an element, as they are", (5, 5000), BF16, normalize=False)
    yield case("forward", (5, 200), F16, grads=0)
    index = torch.tensor([[2, 0, 2], [1, 1, 0]], device=device)
    yield case("with an index", (2, 3, 200), BF16, index=index)
    yield case("with an index and weights", (2, 3, 1000), F32, index=index, weight=torch.arange(3.0, device=device))
    yield case("as they are", (5, 200), F32, FD.mse_loss, normalize=False)
    yield case("elements, forward", (5, 200), F32, FD.mse_loss, reduction="none", grads=0)


def resize(device: str) -> Iterator[Case]:
    def case(
        name: str, dtype: torch.dtype = F32, last: bool = False, side: tuple[int, int] = (20, 30), **options: Any
    ) -> Case:
        images = (normal(device, 2, 3, *side) * 60 + 128).clamp(0, 255).to(dtype)
        images = images.contiguous(memory_format=torch.channels_last) if last else images
        given = {"size": (14, 28), "input_range": (0.0, 255.0), **options}
        grads = int(dtype.is_floating_point)
        return f"preprocess {dtype}, {name}", partial(gradients, FD.preprocess, images, grads=grads, **given)

    yield case("bilinear")
    yield case("bytes", U8, out_dtype=BF16)
    yield case("bytes, channels last, patches", U8, last=True, patch_size=14)
    yield case("channels last, clamped patches", BF16, last=True, patch_size=14, clamp=True)
    yield case("antialias", F32, antialias=True)
    yield case("bicubic", BF16, interpolation="bicubic")
    yield case("bicubic, antialias", F32, interpolation="bicubic", antialias=True)
    yield case("several segments", F32, side=(3, 1500), size=(3, 40))
    yield case("enlarged", BF16, size=(37, 51))
    yield case("its own size", F32, size=(20, 30))
    yield case("bilinear", F64, antialias=True, clamp=True)


def vicreg(device: str) -> Iterator[Case]:
    def loss(*inputs: Tensor, tf32: bool = False, **options: Any) -> Tensor:
        with matrix_precision(tf32):
            return FD.vicreg_loss(*inputs, **options).loss

    def case(name: str, shape: tuple[int, int], dtype: torch.dtype, mean: float = 0.0, **options: Any) -> Case:
        inputs = [(normal(device, *shape) + mean).to(dtype) for _ in range(2)]
        return f"vicreg_loss {shape[0]} x {shape[1]} {dtype}, {name}", partial(gradients, loss, *inputs, **options)

    yield case("by rows, split", (40, 600), F32)
    yield case("by columns, split, runs of rows merged", (1100, 40), BF16)
    yield case("by rows, large means", (40, 304), F16, mean=100.0)
    yield case("by columns, large means", (300, 48), BF16, mean=100.0)
    yield case("by rows, in whole tiles", (128, 256), BF16)
    yield case("by columns, in whole tiles", (256, 128), F16)
    yield case("by rows, TF32, to both", (70, 80), F32, grads=2, tf32=True)
    yield case("by columns", (80, 70), F32)
    yield case("by rows, to both", (20, 304), BF16, grads=2)
    yield case("by columns", (300, 32), F16)
    yield case("by rows, split", (20, 1200), F64)
    yield case("without a covariance", (20, 60), F32, cov_weight=0.0, grads=2)
    for dtype in (BF16, F32, F16, F64):
        for route, shape in (("gram", (24, 304)), ("covariance", (300, 48))):
            student, target = (normal(device, *shape, dtype=dtype) for _ in range(2))
            name = f"vicreg_loss {shape[0]} x {shape[1]} {dtype}, of a rank by {route}"
            yield name, middle_rank(student, target, route)


def standardize(device: str) -> Iterator[Case]:
    def case(name: str, shape: tuple[int, int], dtype: torch.dtype, **options: Any) -> Case:
        inputs = [normal(device, *shape, dtype=dtype) for _ in range(2)]
        call = partial(gradients, FD.mse_loss, *inputs, whiten=True, **options)
        return f"whitened mse_loss {shape[0]} x {shape[1]} {dtype}, {name}", call

    yield case("runs of rows merged", (600, 40), BF16)
    yield case("as they are", (40, 700), F32, normalize=False)
    yield case("runs of rows merged", (600, 90), F64)
    for shape, dtype in (((600, 40), BF16), ((40, 700), F32), ((600, 90), F64)):
        mask = torch.arange(shape[0], device=device) % 3 != 0
        yield case("rows left out", shape, dtype, weight=mask.to(F32))
        yield case("rows left out, as they are", shape, dtype, weight=mask.to(F32), normalize=False)


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.exercise", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="start no case after them")
    seconds, start = parser.parse_args().seconds, time.monotonic()
    device = session.default_device()
    found = cases(device)
    for i, (name, call) in enumerate(found):
        if time.monotonic() - start > seconds:
            print(f"out of time: {len(found) - i} of {len(found)} cases are left")
            return OUT_OF_TIME
        print(name, flush=True)
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    print(f"{len(found)} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
