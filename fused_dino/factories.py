"""Factories of a supervision's parts: each takes a known name, or any module in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .losses import CosineLoss, MSELoss, VICRegLoss
from .preprocess import Preprocess
from .teacher.backbone import IMAGENET_MEAN, IMAGENET_STD, DINOv2Backbone, read_statistic
from .teacher.weights import VARIANTS, canonical
from .validation import check_choice, check_flag, check_floating_dtype, check_group, is_int, plain_int

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def make_teacher(
    teacher: str | nn.Module, img_size: tuple[int, int], pretrained: bool, dtype: torch.dtype | None
) -> nn.Module:
    check_flag("pretrained", pretrained)
    check_floating_dtype("teacher_dtype", dtype)
    if isinstance(teacher, str):
        # No checkpoint of the model holds its weights, so that they are loaded even inside torch.device("meta").
        with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
            name: dict[str, Any] = {"variant" if names_dinov2(teacher) else "model": teacher}
            return DINOv2Backbone(**name, img_size=img_size, pretrained=pretrained, dtype=dtype)
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a model's name or a module, got {type(teacher).__name__}")
    if not is_int(getattr(teacher, "embed_dim", None)):
        raise ValueError(
            f"teacher {type(teacher).__name__} must have an int embed_dim, the width of its features; "
            "DINOv2Backbone(model=...) makes a teacher of a model of timm's or transformers'"
        )
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


def make_loss(
    loss_type: str | nn.Module, stopgrad_image: bool, group: ProcessGroup | str | None, backend: str | None
) -> nn.Module:
    check_group(group, auto=True)
    if isinstance(loss_type, nn.Module):
        if isinstance(loss_type, VICRegLoss) and group != "auto":
            raise ValueError("group belongs to the loss where loss_type is a module: VICRegLoss(group=...)")
        if not stopgrad_image and getattr(loss_type, "detach_teacher", False):
            raise ValueError("stopgrad_image=False needs a loss_type with detach_teacher=False")
        return loss_type
    options: dict[str, Any] = {"detach_teacher": stopgrad_image, "backend": backend}
    check_choice("loss_type", loss_type, ("cosine", "mse", "vicreg"))
    if loss_type == "vicreg":
        return VICRegLoss(group=group, **options)
    return CosineLoss(**options) if loss_type == "cosine" else MSELoss(**options)


def make_preprocess(
    preprocess: str | nn.Module,
    img_size: tuple[int, int],
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
    return Preprocess(img_size, mean=mean, std=std, **options)


def check_latents(z_text: Any, in_dim: int | None) -> None:
    """Check latents [B, in_dim] of a supervision that was constructed with this in_dim."""
    if in_dim is None:
        raise ValueError("z_text must be left out: in_dim=None leaves it no projector; construct with its width")
    if z_text is None:
        raise ValueError(f"z_text must be a tensor [B, {in_dim}], got None, and no tokens in its place")
    if not isinstance(z_text, Tensor):
        raise TypeError(f"z_text must be a tensor [B, {in_dim}], got {type(z_text).__name__}")
    if z_text.ndim != 2 or z_text.shape[1] != in_dim or not z_text.is_floating_point():
        raise ValueError(f"z_text must be floats of shape [B, {in_dim}], got {z_text.dtype} of {list(z_text.shape)}")


def check_latent_shape(latent_shape: Any, in_dim: int | None) -> tuple[int, ...]:
    """Check the shape and return it as a tuple. in_dim: the number of elements that it must have, or None."""
    shape = tuple(latent_shape) if isinstance(latent_shape, Sequence) else ()
    if len(shape) != 3 or not all(map(is_int, shape)):
        raise ValueError(f"latent_shape must be three positive ints (C, h, w), got {latent_shape!r}")
    shape = tuple(map(plain_int, shape))
    if in_dim is not None and math.prod(shape) != in_dim:
        sides = [side for side in range(math.isqrt(in_dim), 1, -1) if in_dim % side**2 == 0]
        fitting = ", ".join(f"({in_dim // side**2}, {side}, {side})" for side in sides) or f"({in_dim}, 1, 1)"
        raise ValueError(
            f"latent_shape {shape} has {math.prod(shape)} elements and in_dim is {in_dim}; "
            f"square maps that fit: {fitting}"
        )
    return shape
