"""What a vision model says of itself: its width, its patches, the tokens before them and its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..sizes import Size
from ..validation import check_triple, is_int, plain_int
from .transformers_model import CLASSES, count_prefix_tokens, find_core, is_pretrained, read_own_statistics
from .weights import PATCH_SIZE


def read_embed_dim(model: nn.Module) -> int:
    """Return the features' width. num_features comes first, since embed_dim is the width of Swin's first stage."""
    for name in ("num_features", "embed_dim"):
        if is_int(width := getattr(model, name, None)):
            return plain_int(width)
    if (core := find_core(model)) is not None:
        return int(core.config.hidden_size)
    hint = f"; of transformers' models these have one: {', '.join(CLASSES.values())}" if is_pretrained(model) else ""
    raise ValueError(
        f"model {type(model).__name__} must have an int embed_dim or num_features, its features' width{hint}"
    )


def read_prefix_tokens(model: nn.Module) -> int:
    """Return how many tokens come before the patches: the model's num_prefix_tokens, or transformers', else 1."""
    core = find_core(model)
    return int(getattr(model, "num_prefix_tokens", 1 if core is None else count_prefix_tokens(core)))


def read_patch_size(model: nn.Module) -> int:
    """Return the pixels per side of a token: timm's last reduction, or the model's own patch_size, else 14."""
    if stages := getattr(model, "feature_info", None):
        return int(stages[-1]["reduction"])
    embed: Any = getattr(model, "patch_embed", None)
    core = find_core(model)
    default = PATCH_SIZE if core is None else core.config.patch_size
    size: Any = getattr(model, "patch_size", None) or getattr(embed, "patch_size", default)
    sides = set(size) if isinstance(size, Sequence) else {size}
    if len(sides) != 1 or not all(map(is_int, sides)):
        raise ValueError(f"{type(model).__name__} must have a patch_size of a positive int, for squares, got {size!r}")
    return int(sides.pop())


def read_statistic(model: nn.Module, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return the model's own mean or std, or that of its configuration by timm or transformers, else the default."""
    value = getattr(model, name, None)
    if value is None:
        core = find_core(model)
        known = getattr(model, "pretrained_cfg", None) or ({} if core is None else read_own_statistics(core))
        value = known.get(name, default)
    numbers = torch.as_tensor(value, dtype=torch.float64, device="cpu").flatten().tolist()
    return check_triple(f"{name} of {type(model).__name__}", numbers, positive=name == "std")


def check_fixed_size(model: nn.Module, img_size: Size) -> None:
    """Raise ValueError if a timm model takes images of one size only, and img_size is another."""
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(embed, "strict_img_size", False) and tuple(embed.img_size) != img_size:
        raise ValueError(f"img_size must be {tuple(embed.img_size)}, which model was built for, got {img_size}")
