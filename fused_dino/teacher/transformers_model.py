"""Vision models of transformers as teachers: their widths, patches, tokens and statistics.

transformers itself is not imported: a model is known by its class, and by the model_type in its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..sizes import Size
from .weight_files import PREPROCESSOR, read_statistics

CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
    "siglip_vision_model": "SiglipVisionModel",
}
SIGLIP = "siglip_vision_model"  # has no class token, and was trained with a mean and std of 0.5


def is_pretrained(model: nn.Module) -> bool:
    return any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def is_known(model: Any) -> bool:
    return is_pretrained(model) and getattr(model.config, "model_type", None) in CLASSES


def find_core(model: nn.Module) -> Any:
    """Return the one known model of transformers that `model` is or wraps, or None.

    Nothing is looked for inside of transformers' other models, which take more than images.
    """
    cores = find_cores(model)
    return cores[0] if len(cores) == 1 else None


def find_cores(model: nn.Module) -> list[Any]:
    if is_pretrained(model):
        return [model] if is_known(model) else []
    return [core for child in model.children() for core in find_cores(child)]


def without_head(model: nn.Module) -> nn.Module:
    """Return the model inside of a classifier of transformers, and any other module as it is."""
    known: Any = model
    names = (CLASSES[known.config.model_type],) if is_known(model) else ()
    return next((child for child in model.children() if type(child).__name__ in names), model)


def count_prefix_tokens(core: Any) -> int:
    """Return how many tokens, the class token and registers, come before the patches."""
    return 0 if core.config.model_type == SIGLIP else 1 + (getattr(core.config, "num_register_tokens", None) or 0)


def read_own_statistics(core: Any) -> dict[str, tuple[float, float, float]]:
    """Return 'mean' and 'std' of the preprocessor_config.json beside the weights that the model was loaded from.

    The file is in the model's folder, or in Hugging Face's cache. If there is none, the result has the values of the
    type.
    """
    half = (0.5, 0.5, 0.5)
    known = {"mean": half, "std": half} if core.config.model_type == SIGLIP else {}
    name = getattr(core.config, "_name_or_path", None)
    if not name:
        return known
    if Path(name).is_dir():
        return known | read_statistics(Path(name) / PREPROCESSOR)
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    revision = getattr(core.config, "_commit_hash", None)
    try:
        file = try_to_load_from_cache(name, PREPROCESSOR, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except HFValidationError:  # a folder that is gone
        return known
    return known | (read_statistics(Path(file)) if isinstance(file, str) else {})


def call_options(model: Any, size: Size | None) -> dict[str, bool]:
    """Return the arguments with which a known model takes images of this size, or of any, and names its outputs.

    Any other model gets no arguments.
    """
    if not is_known(model):
        return {}
    resized = model.config.model_type == SIGLIP and size != (model.config.image_size,) * 2
    return {"return_dict": True} | ({"interpolate_pos_encoding": True} if resized else {})


def split_tokens(features: Mapping[str, Any], prefix: int) -> tuple[Tensor, Tensor]:
    """Return (global [B, D], patch [B, N, D]) of an output of transformers: its class token, else what it pooled."""
    tokens = features["last_hidden_state"]
    patch = tokens[:, prefix:]
    if prefix:
        return tokens[:, 0], patch
    pooled = features.get("pooler_output")
    return patch.mean(1) if pooled is None else pooled, patch
