"""A module with a frozen teacher that its trainer never sees, and that teacher's features of images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Features, check_features
from ..hidden import apply_to_teacher, check_loaded, own_before_loading, share
from ..preprocess import Preprocess
from ..validation import check_images, check_size, check_tensor, check_values
from .backbone import read_patch_size


class Taught(nn.Module):
    """Holds `teacher` outside of its submodules: parameters(), modules() and state_dict() lack it, and .to() moves it.

    img_size, preprocess and stopgrad_image are those of DinoSupervision; teacher_grid: (rows, columns) of its tokens.
    """

    teacher: Any  # no submodule: see __setattr__
    preprocess: nn.Module
    img_size: tuple[int, int]
    teacher_grid: tuple[int, int]
    stopgrad_image: bool

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":
            # nn.Module's own __setattr__ would register it as a submodule.
            self.__dict__[name] = value.requires_grad_(False).eval()
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Taught:
        super()._apply(fn, recurse)
        apply_to_teacher(self.teacher, fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Taught:
        """A copy shares the teacher's memory, until one of the two is moved, cast or loaded.

        A weight of the teacher that is written in place is written in both.
        """
        share(self.teacher, memo)
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        own_before_loading(self.teacher)
        own_before_loading(copied.teacher)
        return copied

    @torch.no_grad()
    def encode(self, x_img: Tensor) -> Features:
        """Returns the teacher's features of images, detached: to cache, or to compute ahead.

        Args:
            x_img (Tensor): Images [B, 3, H, W] of any size, floats in -1..1 or uint8 in 0..255 unless ``input_range``
                or ``preprocess`` says otherwise. They are moved to the teacher's device.

        Returns:
            dict: ``'global'`` [B, D] and ``'patch'`` [B, N, D] or None, in the teacher's dtype.

        Raises:
            ValueError: If the images, or the teacher's result, are not of these shapes. The message names them.
            TypeError: If ``x_img`` is no tensor.
        """
        return self._teach(x_img)

    @torch.no_grad()
    def check(self, x_img: Tensor) -> str:
        """Says how a batch of images lies in ``input_range``. Call it once, before training: it waits for the device.

        Args:
            x_img (Tensor): Images, as for ``encode``.

        Returns:
            str: A sentence with the least and the largest value, and the share that lies outside.

        Raises:
            ValueError: If values are not finite, over 1% of them lie outside, or all lie in one half of the range, as
                those of 0..1 do in -1..1.
            TypeError: If ``preprocess`` is no Preprocess, whose range is not known here.
        """
        if not isinstance(self.preprocess, Preprocess):
            raise TypeError(
                f"check needs a Preprocess, whose range it knows; preprocess is {type(self.preprocess).__name__}"
            )
        check_images(x_img, "x_img")
        return check_values("x_img", x_img, self.preprocess.range_of(x_img.dtype))

    def _teach(self, x_img: Tensor) -> Features:
        check_tensor("x_img", x_img)
        check_loaded(self.teacher, x_img)
        if self.teacher.training:  # another module that holds it as a submodule may have set that
            self.teacher.eval()
        weight = next((p for p in self.teacher.parameters() if p.is_floating_point()), None)
        if weight is not None:
            x_img = x_img.to(weight.device, non_blocking=True)
        dtype = None if weight is None else weight.dtype
        x = self.preprocess(x_img, dtype) if isinstance(self.preprocess, Preprocess) else self.preprocess(x_img)
        check_tensor("preprocess's result", x)
        found = self.teacher(x if dtype is None else x.to(dtype))
        return check_features("teacher's result", found, self.teacher.embed_dim, len(x))

    def _check_images(self, x_img: Any, features: Any) -> int:
        """Check that one of the two is given, and return its batch size."""
        if features is not None and x_img is not None:
            raise ValueError("give x_img or features, not both: features are what encode(x_img) returned")
        if features is not None:
            return len(check_features("features", features, self.teacher.embed_dim)["global"])
        if x_img is None:
            raise ValueError("give x_img, the images, or features, what encode returned for them; got neither")
        if isinstance(self.preprocess, Preprocess):
            check_images(x_img, "x_img")
        check_tensor("x_img", x_img)
        if not self.stopgrad_image and not x_img.is_floating_point():
            raise ValueError(f"x_img must be floats where stopgrad_image=False: {x_img.dtype} has no gradient")
        return len(x_img)

    def _features(self, x_img: Any, features: Mapping[str, Any] | None, device: torch.device) -> Features:
        """Return the features that are given, or else those of the images, on the student's device."""
        if features is None:
            features = self.encode(x_img) if self.stopgrad_image else self._teach(x_img)
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in features.items()}  # type: ignore

    def _patch_tokens(self, features: Features) -> Tensor | None:
        """Return patch tokens [B, N, D], detached with stopgrad_image, or None if the teacher gives none."""
        tokens = features.get("patch")
        if tokens is None:
            return None
        h, w = self.teacher_grid
        if tokens.shape[1] != h * w:
            raise ValueError(
                f"the features have {tokens.shape[1]} patch tokens where img_size={self.img_size} has {h} x {w}: "
                "give the teacher's patch_size, and strip class and register tokens"
            )
        return tokens.detach() if self.stopgrad_image else tokens

    def _global_token(self, features: Features) -> Tensor:
        """Return the global token [B, D], detached with stopgrad_image."""
        token: Tensor = features["global"]
        return token.detach() if self.stopgrad_image else token

    def _find_grid(self, img_size: Any) -> tuple[int, int]:
        """Return the teacher's grid for images of self.img_size. img_size: as the user wrote it, for errors."""
        patch = read_patch_size(self.teacher)
        if self.img_size[0] % patch or self.img_size[1] % patch:
            raise ValueError(f"img_size must be a multiple of the teacher's patch size {patch}, got {img_size!r}")
        built = getattr(self.teacher, "img_size", None)
        if built is not None and check_size(built, "the teacher's img_size") != self.img_size:
            raise ValueError(f"img_size is {self.img_size} and the teacher was built for {built}")
        return self.img_size[0] // patch, self.img_size[1] // patch

    def _warn_once(self) -> None:
        """Warn once that patch tokens are missing. Compiled code cannot warn, but the logs say it too."""
        if not (self._warned or torch.compiler.is_compiling()):
            self._warned = True
            warnings.warn(
                "the teacher gives no patch tokens: every region and token is aligned with its global token",
                stacklevel=4,
            )
