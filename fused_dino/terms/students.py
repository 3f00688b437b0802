"""What hidden tokens may be: tokens, a map, or frames of videos."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from ..features import Grid


def as_tokens(name: str, x: Any, dim: int, batch: int) -> tuple[Tensor, Grid | None]:
    """Return a student's tokens as [B, N, C], and the grid of a map. Another shape raises ValueError."""
    expected = f"{name} must be floats of shape [B, N, {dim}]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{expected}, got {type(x).__name__}")
    shape = tuple(x.shape)
    if not x.is_floating_point() or len(shape) not in (3, 4):
        raise ValueError(f"{expected}, got {x.dtype} of {list(shape)}")
    if len(shape) == 3 and shape[2] == dim:
        if shape[0] != batch:
            raise ValueError(f"{name} must have the images' batch size {batch}, got shape {list(shape)}")
        return x, None
    if len(shape) == 4 and shape[3] == dim and shape[0] * shape[1] == batch:
        return x.flatten(0, 1), None
    if len(shape) == 4 and shape[1] == dim and shape[0] == batch:
        return rearrange(x, "b c h w -> b (h w) c"), (shape[2], shape[3])
    raise ValueError(
        f"{expected}, a map [B, {dim}, h, w] or frames [B, T, N, {dim}] of {batch} images, got {x.dtype} of "
        f"{list(shape)}"
    )
