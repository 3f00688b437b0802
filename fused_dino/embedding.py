"""Patches in place of pixels: a teacher's embedding of them as one matrix product."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def caller() -> int:
    """The thread, of which a module may serve several; a compiler traces one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class PatchProjection(nn.Conv2d):
    """A convolution that gives, once, what its caller has left in `results`, where it has."""

    results: dict[int, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        result = self.results.pop(caller(), None)
        return super().forward(input) if result is None else result


def take_patches(model: nn.Module, patch_size: int) -> PatchProjection | None:
    """The model's convolution by patches, able from now on to be told its result; None where it has none such."""
    conv: Any = getattr(getattr(model, "patch_embed", None), "proj", None)
    by_patches = {"in_channels": 3, "groups": 1, "dilation": (1, 1), "padding": (0, 0)}
    by_patches |= dict.fromkeys(("kernel_size", "stride"), (patch_size, patch_size))
    if type(conv) is nn.Conv2d and all(getattr(conv, name) == value for name, value in by_patches.items()):
        conv.__class__ = PatchProjection  # in its place, so that parameters, their names and hooks stay
        conv.__dict__["results"] = {}
    return conv if isinstance(conv, PatchProjection) else None


def from_patches(
    model: nn.Module,
    run: Callable[[Tensor], Any],  # of the model: pixels -> features
    patches: Tensor,  # [B, N, 3 p p]
    img_size: tuple[int, int],
    patch_size: int,
) -> Any:
    """The model's features, with its projection's result in place of what it would make of pixels."""
    projection = take_patches(model, patch_size)
    refused = f"x must be pixels [B, 3, H, W], got patches {list(patches.shape)}: model {type(model).__name__}"
    if projection is None:
        raise ValueError(f"{refused} has no patch_embed.proj that is a convolution by patches of {patch_size}")
    tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)
    left = projection.results
    left[caller()] = rearrange(tokens, "b (h w) d -> b d h w", h=img_size[0] // patch_size)
    try:
        # Of these pixels the model sees the shape only; they take no memory.
        features = run(patches.new_zeros(()).expand(patches.shape[0], 3, *img_size))
        if caller() in left:
            raise ValueError(f"{refused} never ran its patch_embed.proj")
    finally:
        left.pop(caller(), None)
    return features
