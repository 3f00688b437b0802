"""The size of a teacher's input: fixed, or a rule that is applied to the size of each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .validation import check_size, is_int, is_number, plain_int

Size = tuple[int, int]  # (height, width) in pixels
SizeRule = Callable[[int, int, int], tuple[float, float]]  # (height, width, patch size) -> (height, width)


@dataclass(frozen=True)
class Scaled:
    """Size rule: the images' own height and width, times a ratio.

    ``Scaled(7 / 8)`` gives a latent grid of 16-pixel cells and a teacher of 14-pixel patches the same grid.

    Args:
        ratio (float): Factor of both sides.

    Shape:
        - Call: (height, width, patch size) of ints
        - Output: (height, width), multiples of the patch size: the nearest, at least one

    Raises:
        ValueError: If ``ratio`` is no positive finite number.

    Example:
        >>> Scaled(7 / 8)(256, 384, 14)
        (224, 336)
    """

    ratio: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", check_positive("ratio", self.ratio))

    def __call__(self, h: int, w: int, patch: int) -> Size:
        return nearest(h * self.ratio, patch), nearest(w * self.ratio, patch)


@dataclass(frozen=True)
class Area:
    """Size rule: a fixed number of pixels, in the images' own aspect.

    Args:
        pixels (float): Height times width.

    Shape:
        - Call: (height, width, patch size) of ints
        - Output: (height, width), multiples of the patch size: the nearest, at least one

    Raises:
        ValueError: If ``pixels`` is no positive finite number.

    Example:
        >>> Area(224 * 224)(512, 2048, 14)
        (112, 448)
    """

    pixels: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", check_positive("pixels", self.pixels))

    def __call__(self, h: int, w: int, patch: int) -> Size:
        ratio = math.sqrt(self.pixels / (h * w))
        return nearest(h * ratio, patch), nearest(w * ratio, patch)


def check_img_size(img_size: Any, patch: int = 1) -> Size | SizeRule:
    """Return a rule as it is and a fixed size as (h, w), or raise unless both are positive multiples of `patch`."""
    if isinstance(img_size, type):
        raise TypeError(f"img_size must be an int, a pair (h, w) or a rule, got the class {img_size.__name__} itself")
    if callable(img_size):
        return img_size
    size = tuple(img_size) if isinstance(img_size, Sequence) else (img_size, img_size)
    if len(size) != 2 or not all(map(is_int, size)):
        raise ValueError(
            "img_size must be a positive int or a pair (h, w) of them, or a rule (h, w, patch) -> (h, w), "
            f"got {img_size!r}"
        )
    h, w = size = plain_int(size[0]), plain_int(size[1])
    if h % patch or w % patch:
        below = tuple(max(side // patch, 1) * patch for side in size)
        above = tuple(-(-side // patch) * patch for side in size)
        raise ValueError(
            f"img_size must be a multiple of the patch size {patch}, got {img_size!r}; "
            f"the nearest: {' or '.join(map(str, sorted({below, above})))}"
        )
    return h, w


def resolve(img_size: Any, h: int, w: int, patch: int) -> Size:
    """Return the teacher's (height, width) for images of h x w: a fixed size as it is, or the result of a rule.

    Each side of a rule's size goes to the nearest multiple of `patch`, at least one. A half goes up.
    """
    if not callable(img_size):
        return check_size(img_size, "img_size")
    size: Any = img_size(h, w, patch)
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_number(side) and side > 0 for side in size):
        raise ValueError(
            f"img_size must give two positive finite numbers (h, w), and {img_size!r} gave {size!r} for images of "
            f"{h} x {w} at patch size {patch}; Scaled(7 / 8) and Area(224 * 224) are rules that would do"
        )
    return nearest(size[0], patch), nearest(size[1], patch)


def nearest(side: float, patch: int) -> int:
    """Return the multiple of `patch` nearest to a side, at least one."""
    return max(math.floor(side / patch + 0.5), 1) * patch


def check_positive(name: str, value: Any) -> float:
    if not is_number(value) or not value > 0:
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)
