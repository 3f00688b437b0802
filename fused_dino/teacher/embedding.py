"""Patch embedding outside of the model, for patches or raw images in place of a teacher's usual input."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..sizes import Size
from .caching import Cache, Caching
from .pixels import Raw, embed, reads_all_pixels
from .transformers_model import is_known


def caller() -> int:
    """Return the id of this thread: a module may serve several. A compiler traces one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class PatchProjection(Caching, nn.Conv2d):
    """A Conv2d whose next output can be injected: it returns the result stored for this thread, else it convolves.

    It caches its folded weights. reads_all: whether the model reads its images here alone.
    """

    results: dict[int, Tensor]
    reads_all: bool

    def forward(self, input: Tensor) -> Tensor:
        result = self.results.pop(caller(), None)
        return super().forward(input) if result is None else result


def take_patches(model: nn.Module, patch_size: int) -> PatchProjection | None:
    """Make the model's convolution by patches a PatchProjection and return it, or None if the model has none."""
    conv: Any = getattr(getattr(model, "patch_embed", None), "proj", None)
    if is_known(model):
        conv = next(part for part in model.modules() if isinstance(part, nn.Conv2d))  # of transformers: it has one
    by_patches = {"in_channels": 3, "groups": 1, "dilation": (1, 1)}
    by_patches |= dict.fromkeys(("kernel_size", "stride"), (patch_size, patch_size))
    fits = all(getattr(conv, name, None) == value for name, value in by_patches.items())
    if type(conv) is nn.Conv2d and fits and conv.padding in ((0, 0), "valid"):
        conv.__class__ = PatchProjection  # in its place, so that parameters, their names and hooks stay
        vars(conv).update(results={}, cache=Cache(), reads_all=reads_all_pixels(model))
    return conv if isinstance(conv, PatchProjection) else None


def from_patches(
    model: nn.Module,
    run: Callable[[Tensor], Any],  # of the model: pixels -> features
    patches: Tensor,  # [B, N, 3 p p]
    img_size: Size,
    patch_size: int,
) -> Any:
    """Return the model's features of patches. They are embedded here, and the model's projection returns the result."""
    projection = take_patches(model, patch_size)
    refused = f"x must be pixels [B, 3, H, W], got patches {list(patches.shape)}: model {type(model).__name__}"
    if projection is None:
        raise ValueError(f"{refused} has no patch embedding that is a convolution by patches of {patch_size}")
    tokens = F.linear(patches, projection.weight.flatten(1), projection.bias)
    return inject(
        projection, run, rearrange(tokens, "b (h w) d -> b d h w", h=img_size[0] // patch_size), img_size, refused
    )


def from_raw(
    projection: PatchProjection,
    run: Callable[[Tensor], Any],
    images: Tensor,
    raw: Raw,
    weights: tuple[Tensor, Tensor],  # of pixels.folded
) -> Any:
    """Return the model's features of raw images, which are embedded here."""
    return inject(projection, run, embed(images, raw, *weights), raw.size, "the model")


def inject(
    projection: PatchProjection, run: Callable[[Tensor], Any], tokens: Tensor, img_size: Size, refused: str
) -> Any:
    """Return the model's features of tokens [B, D, h, w], which its own projection returns."""
    results = projection.results
    results[caller()] = tokens
    try:
        # Of these pixels the model sees the shape only; they take no memory.
        features = run(tokens.new_zeros(()).expand(tokens.shape[0], 3, *img_size))
        if caller() in results:
            raise ValueError(f"{refused} never ran its patch embedding")
    finally:
        results.pop(caller(), None)
    return features
