"""preprocess, onto 4 x 6 pixels unless a case says otherwise."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fused_dino import functional as FD
from fused_dino.ops import resize
from proving import DEVICE, Case, Op

MODES = list(itertools.product(("bilinear", "bicubic"), (False, True)))


def pixels(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """An image of independent pixels in -1..1, on the device under test."""
    drawn = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return drawn.to(DEVICE, dtype)


def preprocess(images: Tensor, *, backend: str | None = None, size: tuple[int, int] = (4, 6), **options: Any) -> Tensor:
    return FD.preprocess(images, size, backend=backend, **options)


def preprocess_options(images: Tensor, size: tuple[int, int] = (4, 6), **options: Any) -> resize.Options:
    """The options as the public function fills them in."""
    defaults = {"input_range": (-1.0, 1.0), "mean": FD.IMAGENET_MEAN, "std": FD.IMAGENET_STD, "clamp": False}
    defaults |= {"interpolation": "bilinear", "antialias": False, "out_dtype": images.dtype, "patch_size": None}
    return resize.Options(size, **(defaults | options))


def preprocess_scales(images: Tensor, grad_output: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The value is as large as its image's largest finite pixel, normalised.

    The gradient sums as many of the largest grad_output as there are outputs that read one input.
    """
    chosen = preprocess_options(images, **options)
    largest = images.detach().double().abs().flatten(1).nan_to_num(0, 0, 0).amax(1).clamp(max=1e300)
    value = largest * max(chosen.scale) + max(map(abs, chosen.shift))
    readers = math.prod(max(1, out / side) for out, side in zip(chosen.size, images.shape[2:], strict=True))
    gradient = grad_output.double().abs().amax() * max(chosen.scale) * readers
    return value.view(-1, *[1] * (grad_output.ndim - 1)), gradient


PREPROCESS = Op(
    "preprocess",
    preprocess,
    (
        Case((2, 3, 3, 4), "enlarged, by no whole number"),
        Case((2, 3, 9, 17), "reduced: pixels that nobody reads"),
        Case((1, 3, 4, 6), "its own size"),
        Case((1, 3, 4, 9), "its own height"),
        Case((1, 3, 1, 1), "one pixel"),
        Case((2, 3, 5, 7), "one pixel out", {"size": (1, 1)}),
        Case((1, 3, 2, 1200), "far wider than the result: several segments"),
        Case((1, 3, 3, 5), "several blocks of columns", {"size": (2, 300)}),
        Case((9, 3, 2, 2), "several rows a program, and fewer in the last", {"size": (11, 3)}),
        Case((2, 3, 9, 17), "bicubic", {"interpolation": "bicubic"}),
        Case((2, 3, 3, 4), "bicubic, enlarged", {"interpolation": "bicubic"}),
        Case((2, 3, 9, 17), "antialiased", {"antialias": True}),
        Case((2, 3, 3, 4), "antialiased, enlarged", {"antialias": True}),
        Case((1, 3, 4, 9), "antialiased, its own height", {"antialias": True}),
        Case((2, 3, 9, 17), "antialiased, to one column", {"antialias": True, "size": (6, 1)}),
        Case((2, 3, 9, 17), "antialiased, to one row", {"antialias": True, "size": (1, 6)}),
        Case((2, 3, 9, 17), "bicubic and antialiased", {"interpolation": "bicubic", "antialias": True}),
        Case((1, 3, 2, 700), "antialiased, several segments", {"antialias": True, "size": (1, 20)}),
        Case((2, 3, 5, 7), "patches", {"patch_size": 2}),
        Case((2, 3, 9, 7), "clipped", {"clamp": True, "interpolation": "bicubic"}),
        Case((2, 3, 9, 7), "clipped patches", {"clamp": True, "antialias": True, "patch_size": 2}),
        Case((2, 3, 5, 5), "other statistics", {"input_range": (0.25, 3.0), "mean": (0.1, 0, 2), "std": (1, 2, 3)}),
        Case((2, 3, 5, 5), "another dtype", {"out_dtype": torch.float32}),
    ),
    scales=preprocess_scales,
    forward=resize.resize_fwd.overload,
    backward=resize.resize_bwd.overload,
    forward_arguments=lambda x: (x, *preprocess_options(x)),
    backward_arguments=lambda x, out: (torch.ones_like(out), x, *preprocess_options(x)),
    inputs=("images",),
    shape=lambda rows, width: (rows, 3, 3, min(width, 1200)),  # several segments
)  # fmt: skip
