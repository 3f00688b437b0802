"""Measure a whole supervised step in the row's dtype, on random weights, and the share of each of its parts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_dino import DinoSupervision, Projector, costs
from fused_dino import functional as FD

from .harness import Bench, normal
from .models import SIZE, in_timm, ours
from .shapes import STEPS, Row
from .test_cosine import recipe as cosine

IN_DIM = 8192
MEAN, STD = (torch.tensor(x).view(1, 3, 1, 1) for x in (FD.IMAGENET_MEAN, FD.IMAGENET_STD))


class Recipe(nn.Module):
    def __init__(self, row: Row) -> None:
        super().__init__()
        self.teacher: Any = in_timm(row.options["teacher"])
        torch.manual_seed(1)
        self.projector = Projector(IN_DIM, out_dim=self.teacher.embed_dim)
        self.to(getattr(torch, row.dtype))

    def forward(self, z: Tensor, images: Tensor) -> Tensor:
        with torch.no_grad():
            x = ((images + 1) / 2 - MEAN.to(images)) / STD.to(images)
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
            g = self.teacher.forward_features(x)[:, 0]
        return cosine(self.projector(z), g)


class Ours(nn.Module):
    def __init__(self, row: Row, backend: str) -> None:
        super().__init__()
        teacher = ours(row.options["teacher"])
        torch.manual_seed(1)  # the projector's weights are the recipe's
        given = {"backend": "auto" if backend == "triton" else backend}  # not every op in it has a kernel
        self.dino = DinoSupervision(IN_DIM, teacher=teacher, img_size=SIZE, **given)  # type: ignore[arg-type]
        self.to(getattr(torch, row.dtype))

    def forward(self, z: Tensor, images: Tensor) -> Tensor:
        return self.dino(z, images)[0]


def inputs(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    return normal((row.shape[0], IN_DIM), row, generator), normal(row.shape, row, generator).tanh()


def parts(row: Row, z: Tensor, images: Tensor) -> dict:
    """Return the parts of our step. Projector and loss include their backward."""
    teacher = ours(row.options["teacher"]).to(z)
    projector = Projector(IN_DIM, out_dim=teacher.embed_dim).to(z)
    x, see, leaf = FD.preprocess(images, SIZE), torch.no_grad()(teacher), z.detach().requires_grad_()
    g, y = see(x)["global"], projector(z).detach().requires_grad_()
    weights = [leaf, *projector.parameters()]
    return {
        "preprocess": lambda: FD.preprocess(images, SIZE),
        "teacher": lambda: see(x),
        "projector": lambda: torch.autograd.grad(projector(leaf), weights, y),
        "loss": lambda: torch.autograd.grad(FD.cosine_loss(y, g), y),
    }


def work(row: Row, direction: str) -> tuple[float, float]:
    """Count the FLOP of every part, and the least bytes: images, the teacher's weights once, the projector's thrice."""
    model, dtype = costs.on_meta(row.options["teacher"], SIZE), getattr(torch, row.dtype)
    flops = sum(x.flops for x in costs.step(model, row.shape[0], row.shape[2], "cosine", dtype, IN_DIM, SIZE))
    weights = sum(p.numel() for p in model.parameters()) + 3 * (IN_DIM + model.embed_dim) * 4096
    return (3 * row.shape[0] * row.shape[2] * row.shape[3] + weights) * dtype.itemsize, flops


BENCH = Bench("step", STEPS, inputs, Recipe, Ours, work, parts=parts, asks="cosine_loss")
