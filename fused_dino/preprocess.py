"""The preprocessing of images for a teacher, as a module."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional as FD
from .backend import on_reference
from .validation import check_range


class Preprocess(nn.Module):
    """``functional.preprocess`` as a module, its options fixed and checked at construction.

    Args:
        size (int or sequence of two ints): Height and width of the result in pixels. Default: 224.
        input_range (sequence of two floats, optional): As in the function, and so are the options that follow.
        mean (sequence of three floats): Mean of each channel on the scale 0..1. Default: ImageNet's.
        std (sequence of three floats): Deviation of each channel on the scale 0..1. Default: ImageNet's.
        interpolation (str): ``"bilinear"`` or ``"bicubic"``. Default: ``"bilinear"``.
        antialias (bool): Widens the filter where it shrinks an image. Default: ``False``.
        clamp (bool): Clips the resized pixels to ``input_range``. Default: ``False``.
        out_dtype (torch.dtype, optional): Dtype of the result. Default: a call's, else the images' own.
        patch_size (int, optional): Side of the patches to return in place of an image.
        backend (str, optional): Default: see ``use_backend``.

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

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        *,
        input_range: Sequence[float] | None = None,
        mean: Sequence[float] = FD.IMAGENET_MEAN,
        std: Sequence[float] = FD.IMAGENET_STD,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        antialias: bool = False,
        clamp: bool = False,
        out_dtype: torch.dtype | None = None,
        patch_size: int | None = None,
        backend: FD.Backend | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.options: dict[str, Any] = {
            "input_range": input_range, "mean": mean, "std": std, "interpolation": interpolation,
            "antialias": antialias, "clamp": clamp, "out_dtype": out_dtype, "patch_size": patch_size,
            "backend": backend,
        }  # fmt: skip
        FD.preprocess(torch.zeros(1, 3, 1, 1), size, **on_reference(self.options))

    def forward(
        self, images: Tensor, out_dtype: torch.dtype | None = None, size: int | Sequence[int] | None = None
    ) -> Tensor:
        """Preprocess images.

        out_dtype: the result's dtype, unless the module's own options name one; size: in place of the module's own.
        """
        options = self.options
        if out_dtype is not None and options["out_dtype"] is None:
            options = {**options, "out_dtype": out_dtype}
        return FD.preprocess(images, self.size if size is None else size, **options)

    def range_of(self, dtype: torch.dtype) -> tuple[float, float]:
        """Return the values (low, high) that mean black and white in images of a dtype."""
        return check_range(self.options["input_range"], dtype)

    def extra_repr(self) -> str:
        """Return the size, and the options that differ from the op's defaults."""
        defaults = FD.preprocess.__kwdefaults__ or {}
        others = (f", {name}={value}" for name, value in self.options.items() if value != defaults[name])
        return f"size={self.size}{''.join(others)}"
