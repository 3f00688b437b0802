"""Resize and ImageNet normalisation."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .dtypes import upcast


def interpolate(pixels: Tensor, size: Sequence[int], mode: str, antialias: bool) -> Tensor:
    """Resize as F.interpolate does, and correctly if an antialiased result is one column wide. torch on a CPU does not
    resize the rows then. So the transposed image is resized to one row.
    """
    h, w = size
    if antialias and w == 1:
        transposed = F.interpolate(pixels.mT.contiguous(), (w, h), mode=mode, align_corners=False, antialias=True)
        return transposed.mT
    return F.interpolate(pixels, (h, w), mode=mode, align_corners=False, antialias=antialias)


def preprocess(
    images: Tensor,  # [B, 3, H, W]
    size: tuple[int, int],
    *,
    input_range: tuple[float, float],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    interpolation: str,
    antialias: bool,
    clamp: bool,
    out_dtype: torch.dtype,
    patch_size: int | None,
) -> Tensor:
    """Return ((resize(images) - low) / (high - low) - mean) / std, per channel.

    The weights of a resize sum to one, so normalising first, as most trainers do, is the same function. A clamp alone
    does not commute: it acts on the resized pixels.
    """
    low, high = input_range
    (pixels,) = upcast(images)
    pixels = interpolate(pixels, size, interpolation, antialias)
    if clamp:
        pixels = pixels.clamp(low, high)
    # Channel by channel with Python numbers: a tensor of constants would be copied to the device in every call.
    channels = [((x - low) / (high - low) - m) / s for x, m, s in zip(pixels.unbind(1), mean, std, strict=True)]
    out = torch.stack(channels, 1).to(out_dtype)
    if patch_size is None:
        return out
    return rearrange(out, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size).contiguous()
