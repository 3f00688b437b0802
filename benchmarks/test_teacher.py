"""Measure a teacher's forward on normalised images: timm's model, the official code, and ours, of the same weights."""

from typing import Any

import torch
from torch import Tensor, nn

from fused_dino import DINOv2Backbone, costs

from .harness import Bench, normal
from .models import SIZE, in_the_official_code, in_timm, ours
from .shapes import TEACHERS, Row


class Sees(nn.Module):
    """A model of which the class token or the patch tokens are used."""

    def __init__(self, model: Any, row: Row) -> None:
        super().__init__()
        self.model: Any = model.to(getattr(torch, row.dtype))
        self.needs = row.options["needs"]

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.model, DINOv2Backbone):
            return self.model(images, needs=frozenset({self.needs}))[self.needs]
        features = self.model.forward_features(images)
        if isinstance(features, dict):
            return features["x_norm_clstoken" if self.needs == "global" else "x_norm_patchtokens"]
        return features[:, 0] if self.needs == "global" else features[:, 1:]


def work(row: Row, direction: str) -> tuple[float, float]:
    """Count the FLOP of the whole model, and the least bytes: images, weights and result."""
    model, dtype = costs.on_meta(row.options["teacher"], SIZE), getattr(torch, row.dtype)
    flops = sum(kernel.flops for kernel in costs.teacher_kernels(model, row.shape[0], dtype, SIZE))
    rows = row.shape[0] * (1 if row.options["needs"] == "global" else (SIZE // model.patch_size) ** 2)
    numbers = torch.Size(row.shape).numel() + sum(p.numel() for p in model.parameters()) + rows * model.embed_dim
    return numbers * dtype.itemsize, flops


BENCH = Bench(
    op="teacher",
    rows=TEACHERS,
    inputs=lambda row, generator: (normal(row.shape, row, generator),),
    recipe=lambda row: Sees(in_timm(row.options["teacher"]), row),
    ours=lambda row, backend: Sees(ours(row.options["teacher"]), row),
    work=work,
    peers={
        "fused_dino, engine=False": lambda row: Sees(ours(row.options["teacher"], engine=False), row),
        "hub's code": lambda row: Sees(in_the_official_code(row.options["teacher"]), row),
    },
    backends=False,
)
