"""The one rule of precision, which every op keeps."""

from contextlib import nullcontext

import torch
from torch import Tensor


def acc_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic: float64 as soon as one of the tensors is float64, float32 otherwise."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the tensors to the dtype of their arithmetic."""
    return tuple(x.to(acc_dtype(*tensors)) for x in tensors)


def scaled(value: Tensor, factor: float | Tensor) -> Tensor:
    """Return value * factor. In torch's forward mode a number times a scalar tensor has a float64 tangent."""
    return (value.unsqueeze(-1) * factor).squeeze(-1)


def without_autocast(x: Tensor) -> torch.autocast | nullcontext:
    """Turn autocast off on the device of `x`, since it makes products of float32 matrices bfloat16."""
    # meta tensors have no autocast
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
