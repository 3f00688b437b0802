"""The kinds of outputs that vision models return, each read as a global feature and patch tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from .transformers_model import split_tokens

GLOBAL_KEYS = ("global", "x_norm_clstoken", "cls_token")
PATCH_KEYS = ("patch", "x_norm_patchtokens", "patch_tokens")


def split_features(output: Any, model: nn.Module, prefix: int) -> tuple[Tensor, Tensor | None]:
    """Return (global [B, D], patch [B, N, D] or None) of any output of the model, which has `prefix` tokens first."""
    if isinstance(output, Mapping):
        pooled = next((output[key] for key in GLOBAL_KEYS if key in output), None)
        if pooled is None and "last_hidden_state" in output:
            return split_tokens(output, prefix)
        if pooled is None:
            raise ValueError(f"model gave {sorted(output)}, and no features as {' or '.join(GLOBAL_KEYS)}")
        return pooled, next((output[key] for key in PATCH_KEYS if key in output), None)
    if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
        raise ValueError(f"model gave {type(output).__name__} in place of a dict, tokens, a map or pooled features")
    if output.ndim == 2:
        return output, None
    if output.ndim == 4:
        layout = "b h w d" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "b d h w"
        patch = rearrange(output, f"{layout} -> b (h w) d")
    else:
        patch = output[:, prefix:]
        # Prefix tokens may all be registers.
        if prefix and getattr(model, "cls_token", True) is not None:
            return output[:, 0], patch
    head: Any = getattr(model, "forward_head", None)
    pooled = patch.mean(1) if head is None else head(output, pre_logits=True)
    # Some heads widen what they pool.
    return pooled if pooled.shape[-1] == patch.shape[-1] else patch.mean(1), patch
