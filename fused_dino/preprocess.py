"""Preprocess: images to a teacher's input."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as FD
from .validation import check_range


class Preprocess(nn.Module):
    """``functional.preprocess`` as a module, its options fixed and checked at construction.

    Args:
        size (int or sequence of two ints): Height and width of the result in pixels. Default: 224.
        **options: Keyword arguments of ``functional.preprocess``: input_range, mean, std, interpolation, antialias,
            clamp, out_dtype, patch_size, backend.

    Shape:
        - images: :math:`(B, 3, H, W)`
        - Output: :math:`(B, 3, h, w)`, or patches :math:`(B, N, 3 p^2)` with ``patch_size``

    Raises:
        ValueError: If an option is out of range. The message names it.
        TypeError: If an option is unknown.

    Example:
        >>> Preprocess(224, antialias=True)(torch.zeros(2, 3, 300, 400)).shape
        torch.Size([2, 3, 224, 224])
    """

    def __init__(self, size: int | Sequence[int] = 224, **options: Any) -> None:
        super().__init__()
        self.size = size
        self.options = options
        FD.preprocess(torch.zeros(1, 3, 1, 1), size, **FD.rehearsal(options))

    def forward(self, images: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """out_dtype: of this result, where the module's own options name none."""
        options = self.options
        if out_dtype is not None and options.get("out_dtype") is None:
            options = {**options, "out_dtype": out_dtype}
        return FD.preprocess(images, self.size, **options)

    def range_of(self, dtype: torch.dtype) -> tuple[float, float]:
        """The values (low, high) that this module takes for black and white in images of a dtype."""
        return check_range(self.options.get("input_range"), dtype)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in {"size": self.size, **self.options}.items())
