"""Position embeddings for images of any size: resampled as in the official code, and cached for the sizes used last."""

from __future__ import annotations

import math
import sys
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..features import Grid
from .caching import Cache, Caching

SOURCES = {  # the position embeddings of classes that have a method interpolate_pos_encoding
    "DinoVisionTransformer": "pos_embed",
    "Dinov2Embeddings": "position_embeddings",
    "Dinov2WithRegistersEmbeddings": "position_embeddings",
    "SiglipVisionEmbeddings": "position_embedding.weight",
}


class Resampling(NamedTuple):
    """Options of resize_pos_embed; the defaults are timm's."""

    antialias: bool = True
    offset: float = 0.0


def resampling_of(pos_embed: str, registers: bool) -> Resampling:
    """Return the resampling of a DINOv2 by the argument pos_embed of DINOv2Backbone."""
    offset = 0.1 if pos_embed == "official" and not registers else 0.0
    return Resampling(antialias=pos_embed == "timm" or registers, offset=offset)


def square_side(positions: Tensor) -> int:
    """Return g for positions [1, P + g*g, D] with P = 0 or 1 prefix tokens, or raise ValueError."""
    side = math.isqrt(positions.shape[1])
    if positions.shape[1] - side * side not in (0, 1):
        raise ValueError(f"its pos_embed has {positions.shape[1]} positions, which is no square grid")
    return side


def resize_pos_embed(positions: Tensor, grid: Grid, to: Grid, *, antialias: bool, offset: float) -> Tensor:
    """Resample positions [1, P + h*w, D], P of them for prefix tokens, of a grid h x w to another, bicubic in float32.

    DINOv2 without registers passes the scale (h + offset) / g to interpolate, with an offset of 0.1. It so samples at
    slightly different points than transformers, which passes the size h. DINOv2 with registers, and timm, pass the size
    and antialias. A grid of the same size stays as it is.

    Source: `interpolate_pos_encoding` in facebookresearch/dinov2, dinov2/models/vision_transformer.py, and in
    transformers, models/dinov2/modeling_dinov2.py.
    """
    if torch.compiler.is_compiling() and not positions.requires_grad:
        return resize_in_graph(positions, *grid, *to, antialias, offset)
    if tuple(grid) == tuple(to):
        return positions
    count = grid[0] * grid[1]
    prefix, patches = positions.split([positions.shape[1] - count, count], dim=1)
    target: dict[str, Any] = {"size": tuple(to)}
    if offset:
        target = {"scale_factor": tuple((side + offset) / g for side, g in zip(to, grid, strict=True))}
    patches = rearrange(patches.float(), "b (h w) d -> b d h w", h=grid[0])
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    return torch.cat([prefix, rearrange(patches, "b d h w -> b (h w) d").to(prefix.dtype)], dim=1)


@torch.library.custom_op("fused_dino::resize_positions", mutates_args=())
def resize_in_graph(
    positions: Tensor, h: int, w: int, rows: int, columns: int, antialias: bool, offset: float
) -> Tensor:
    """Resample as resize_pos_embed does. A compiler that traced its scale would make a program for every size."""
    out = resize_pos_embed(positions, (h, w), (rows, columns), antialias=antialias, offset=offset)
    return out.clone() if out is positions else out


@resize_in_graph.register_fake
def _(positions: Tensor, h: int, w: int, rows: int, columns: int, antialias: bool, offset: float) -> Tensor:
    return positions.new_empty(1, positions.shape[1] - h * w + rows * columns, positions.shape[2])


class Positions(Caching):
    """Caches a module's resampled position embeddings, outside of its state_dict, until it is moved, cast or loaded.

    Its subclasses are mixed into the class of a module that exists, so that parameters, their names and hooks stay.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        mixin, base = type(self).__bases__
        return rebuild, (mixin, base), self.__dict__.copy()


class Interpolated(Positions):
    """A module that resamples by a method of its own, as the embeddings of transformers' models do."""

    def interpolate_pos_encoding(self, x: Tensor, *size: int) -> Tensor:
        interpolate = super().interpolate_pos_encoding  # type: ignore[misc]
        source = attrgetter(SOURCES[type(self).__name__])(self)
        return self.cached((x.shape[1], x.dtype, size), (source,), lambda: interpolate(x, *size))


class Resampled(Positions):
    """A model whose `pos_embed` is resampled here."""

    resampling: Resampling

    def resample(self: Any, grid: Grid, to: Grid) -> Tensor:
        """Return positions [1, P + N, D] for a grid of N patches."""
        source, options = self.pos_embed, self.resampling._asdict()
        return self.cached(to, (source,), lambda: resize_pos_embed(source, grid, to, **options))


class HubPositions(Resampled):
    """The official DINOv2."""

    def interpolate_pos_encoding(self: Any, x: Tensor, h: int, w: int) -> Tensor:
        side, p = square_side(self.pos_embed), self.patch_size
        return self.resample((side, side), (h // p, w // p)).to(x.dtype)


class TimmPositions(Resampled):
    """timm's VisionTransformer, whose patch embedding gives maps [B, h, w, D]."""

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        positions = self.resample(self.patch_embed.grid_size, (x.shape[1], x.shape[2]))
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        x = x.flatten(1, 2)
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*prefix, x + positions], dim=1))
        return self.pos_drop(torch.cat([*prefix, x], dim=1) + positions)


@cache
def mixed(mixin: Any, base: Any) -> Any:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__doc__": base.__doc__})


def rebuild(mixin: Any, base: Any) -> Any:
    kind = mixed(mixin, base)
    return kind.__new__(kind)


def mix(module: Any, mixin: Any, **attributes: Any) -> None:
    base: Any = type(module)
    module.__class__ = mixed(mixin, base)
    vars(module).update(attributes, cache=Cache())


def take_any_size(model: Any, rule: Any, resampling: Resampling) -> None:
    """Let a model take images of any multiple of its patch, or raise ValueError.

    rule: for errors; resampling: of timm's VisionTransformer. Other models resample as they say or do themselves.
    """
    embed: Any = getattr(model, "patch_embed", None)
    if adds_as_timm(model):
        mix(model, TimmPositions, resampling=resampling)
        # The attributes that its constructor's dynamic_img_size=True sets.
        model.dynamic_img_size, embed.strict_img_size, embed.flatten = True, False, False
        embed.output_fmt = type(embed.output_fmt)("NHWC")
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    fixed = known.get("fixed_input_size") and not getattr(model, "dynamic_img_size", False)
    if fixed or getattr(embed, "strict_img_size", False):
        raise ValueError(
            f"img_size must be an int or a pair (h, w), got {rule!r}: model {type(model).__name__} takes one size; of "
            "timm's models those that are built with dynamic_img_size=True take any"
        )
    if type(embed).__name__ == "PatchEmbed" and hasattr(embed, "strict_img_size"):
        embed.img_size = None  # else timm writes the size into a message, for which a compiler makes a program a size
    if hasattr(model, "interpolate_pos_encoding") and hasattr(model, "interpolate_offset"):  # the official code today
        mix(model, HubPositions, resampling=Resampling(model.interpolate_antialias, model.interpolate_offset))
    for part in model.modules():
        if type(part).__name__ in SOURCES and not isinstance(part, Positions):
            mix(part, Interpolated)


def adds_as_timm(model: Any) -> bool:
    """Whether a model adds position embeddings as timm's VisionTransformer does. timm need not be installed."""
    timm: Any = sys.modules.get("timm.models.vision_transformer")
    ways = getattr(type(model), "_pos_embed", None), type(getattr(model, "patch_embed", None)).__name__
    return (
        timm is not None and ways == (timm.VisionTransformer._pos_embed, "PatchEmbed") and model.pos_embed is not None
    )
