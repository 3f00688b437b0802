"""Measure resizing and normalising: images are read and the result is written; a gradient moves the same back."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_dino import costs
from fused_dino import functional as FD

from .harness import Bench, Function, normal
from .shapes import FORWARD, IMAGES, Row

MEAN, STD = (torch.tensor(x).view(1, 3, 1, 1) for x in (FD.IMAGENET_MEAN, FD.IMAGENET_STD))


def inputs(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    if row.dtype == "uint8":
        return (torch.randint(0, 256, row.shape, generator=generator, dtype=torch.uint8),)
    return (normal(row.shape, row, generator).tanh(),)


def out_dtype(row: Row) -> torch.dtype:
    return getattr(torch, row.options.get("out_dtype", "float32" if row.dtype == "uint8" else row.dtype))


def unit(images: Tensor) -> Tensor:
    """Map bytes, or floats in -1..1, to 0..1."""
    return (images + 1) / 2 if images.is_floating_point() else images.float() / 255


def eager(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate((x - MEAN.to(x)) / STD.to(x), size=size, mode="bilinear", align_corners=False)


def torchvision(x: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2 import functional as T

    x = T.normalize(x, list(FD.IMAGENET_MEAN), list(FD.IMAGENET_STD))
    return T.resize(x, list(size), T.InterpolationMode.BILINEAR, antialias=False)


def kornia(x: Tensor, size: tuple[int, int]) -> Tensor:
    from kornia.enhance import normalize
    from kornia.geometry.transform import resize

    return resize(normalize(x, MEAN.to(x).flatten(), STD.to(x).flatten()), size, "bilinear", align_corners=False)


def of(step: Callable, row: Row) -> Function:
    return lambda images: step(unit(images), (row.options["size"],) * 2).to(out_dtype(row))


def exact(row: Row) -> Function:  # the recipe in float64, without its cast
    side = row.options["size"]
    return lambda x: eager(unit(x if x.is_floating_point() else x.double() / 127.5 - 1), (side, side))


def ours(row: Row, backend: str) -> Function:
    return partial(FD.preprocess, size=row.options["size"], out_dtype=out_dtype(row), backend=backend)  # type: ignore[arg-type]


def work(row: Row, direction: str) -> tuple[float, float]:
    itemsizes = getattr(torch, row.dtype).itemsize, out_dtype(row).itemsize
    return costs.preprocess(row.shape, row.options["size"], *itemsizes, direction != FORWARD)


PEERS = {"torchvision v2": partial(of, torchvision), "kornia": partial(of, kornia)}
BENCH = Bench("preprocess", IMAGES, inputs, partial(of, eager), ours, work, PEERS, exact)
