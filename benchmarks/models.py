"""Build one teacher of random weights in timm, in the official code, and as ours."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fused_dino import DINOv2Backbone
from fused_dino.teacher.weights import new_timm

from .harness import Unavailable

SIZE = 224
OFFICIAL = {"s": "vit_small", "b": "vit_base", "l": "vit_large"}  # by the letter of a variant's name


@cache
def weights(name: str) -> dict[str, Tensor]:
    """Return random weights under timm's names. LayerScale is of order one, so that every block counts."""
    torch.manual_seed(0)
    state = new_timm(name, (SIZE, SIZE)).state_dict()
    return {key: torch.linspace(0.1, 1, x.numel()) if key.endswith("gamma") else x for key, x in state.items()}


def in_timm(name: str) -> Any:
    """Return timm's model, untouched."""
    model = new_timm(name, (SIZE, SIZE))
    model.load_state_dict(weights(name))
    return model.requires_grad_(False).eval()


def in_the_official_code(name: str) -> Any:
    """Return the model of torch hub's code. Its positions are those of the size, which hub resamples at each call."""
    try:
        code = import_module("dinov2.models.vision_transformer")
    except ImportError:
        raise Unavailable("the package dinov2, which holds hub's code, is not installed") from None
    model = getattr(code, OFFICIAL[name[3]])(patch_size=14, img_size=SIZE, init_values=1.0, block_chunks=0)
    model.load_state_dict({**weights(name), "mask_token": model.mask_token})
    return model.requires_grad_(False).eval()


def ours(name: str, engine: bool = True) -> DINOv2Backbone:
    backbone = DINOv2Backbone(name, SIZE, pretrained=False, engine=engine)
    backbone.model.load_state_dict(weights(name))
    return backbone
