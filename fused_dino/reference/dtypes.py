"""The one rule of precision, which every op keeps."""

import torch
from torch import Tensor


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors in the dtype of the arithmetic: float64 as soon as one of them is float64, float32 otherwise."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(wide) for x in tensors)
