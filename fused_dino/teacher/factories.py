"""What may be given for a teacher and for its preprocessing: a known name, or any module in its place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..preprocess import Preprocess
from ..validation import check_choice, check_flag, check_floating_dtype, is_int
from .backbone import IMAGENET_MEAN, IMAGENET_STD, DINOv2Backbone
from .reading import read_statistic
from .weights import VARIANTS, canonical


def make_teacher(
    teacher: str | nn.Module,
    img_size: Any,
    pretrained: bool,
    dtype: torch.dtype | None,
    layers: Collection[int] = (),
) -> nn.Module:
    """Return a teacher of a name, which gives features of these layers, too, or a module in its place."""
    check_flag("pretrained", pretrained)
    check_floating_dtype("teacher_dtype", dtype)
    if isinstance(teacher, str):
        # No checkpoint of the model holds its weights, so that they are loaded even inside torch.device("meta").
        with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
            options: dict[str, Any] = {"variant" if names_dinov2(teacher) else "model": teacher}
            options.update(img_size=img_size, pretrained=pretrained, dtype=dtype, layers=tuple(layers) or None)
            return DINOv2Backbone(**options)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a model's name or a module, got {type(teacher).__name__}")
    if not is_int(getattr(teacher, "embed_dim", None)):
        raise ValueError(
            f"teacher {type(teacher).__name__} must have an int embed_dim, the width of its features; "
            "DINOv2Backbone(model=...) makes a teacher of a model of timm's or transformers'"
        )
    if isinstance(teacher, DINOv2Backbone):
        blocks = {} if teacher.layers is None else teacher.layers.blocks
        if missing := sorted(set(layers) - blocks.keys()):
            raise ValueError(f"teacher gives no layer {missing[0]}, which a term reads: build it with layers={missing}")
    return teacher if dtype is None else teacher.to(dtype=dtype)


def names_dinov2(teacher: str) -> bool:
    """Whether a name is a DINOv2's; False for another model of timm's. A name of neither raises ValueError."""
    try:
        return bool(canonical(teacher))
    except ValueError:
        import timm

        if ":" in teacher or timm.is_model(teacher):  # with one it is a place, such as hf-hub:owner/name
            return False
        raise ValueError(
            f"teacher is {teacher!r}; use a DINOv2, one of {', '.join(VARIANTS)}, or a model that timm "
            f"{timm.__version__} knows"
        ) from None


def make_preprocess(
    preprocess: str | nn.Module,
    img_size: Any,
    input_range: Sequence[float] | None,
    teacher: nn.Module,
    backend: str | None,
) -> nn.Module:
    if isinstance(preprocess, nn.Module):
        if input_range is not None:
            raise ValueError("input_range belongs to preprocess where that is a module: Preprocess(input_range=...)")
        return preprocess
    check_choice("preprocess", preprocess, ("bilinear", "bicubic"))
    mean, std = read_statistic(teacher, "mean", IMAGENET_MEAN), read_statistic(teacher, "std", IMAGENET_STD)
    options: dict[str, Any] = {"interpolation": preprocess, "input_range": input_range, "backend": backend}
    size = 224 if callable(img_size) else img_size  # a rule gives each call its size
    return Preprocess(size, mean=mean, std=std, **options)
