"""A module with a frozen teacher, which no trainer sees, and the teacher's features of images."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ..features import Features, Grid, check_features, check_layers, grid_of, map_features
from ..hidden import apply_to_teacher, check_loaded, own_before_loading, share
from ..preprocess import Preprocess
from ..sizes import check_img_size, resolve
from ..validation import check_images, check_size, check_tensor, check_values
from .backbone import DINOv2Backbone
from .factories import make_preprocess, make_teacher
from .pixels import Raw, read_raw
from .reading import read_patch_size


class Taught(nn.Module):
    """Holds `teacher` outside of its submodules: it is in no parameters(), modules() or state_dict(), but .to() moves
    it.

    img_size, preprocess and stopgrad_image are those of a supervision; teacher_grid: (rows, columns) of its tokens, or
    None where img_size is a rule.
    """

    teacher: Any = None  # no submodule: see __setattr__
    preprocess: nn.Module
    img_size: Any
    patch_size: int
    _takes_needs: bool
    teacher_grid: Grid | None
    stopgrad_image: bool

    def __init__(self) -> None:
        super().__init__()
        self._warned = False

    def hold(
        self, teacher: Any, layers: Collection[int], backend: Any, *, img_size: Any, preprocess: Any, input_range: Any
    ) -> None:
        """Take a teacher, with its preprocessing. layers: those that it must return."""
        if img_size is None:
            img_size = getattr(teacher, "img_size", None) or 224
        self.img_size = check_img_size(img_size)
        self.teacher = make_teacher(teacher, self.img_size, True, None, layers)
        self.preprocess = make_preprocess(preprocess, self.img_size, input_range, self.teacher, backend)
        self.teacher_grid = self._find_grid(img_size)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "teacher":
            # nn.Module's own __setattr__ would register it as a submodule.
            self.__dict__[name] = value.requires_grad_(False).eval()
            called: Any = getattr(value, "_orig_mod", value)  # of torch.compile
            self._takes_needs = "needs" in inspect.signature(called.forward).parameters
        else:
            super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Taught:
        super()._apply(fn, recurse)
        if self.teacher is not None:
            apply_to_teacher(self.teacher, fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Taught:
        """A copy shares the teacher's memory, until one of the two is moved, cast or loaded.

        A weight of the teacher that is written in place is written in both.
        """
        if self.teacher is not None:
            share(self.teacher, memo)
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        for teacher in (self.teacher, copied.teacher):
            if teacher is not None:
                own_before_loading(teacher)
        return copied

    @torch.no_grad()
    def encode(self, x_img: Tensor) -> Features:
        """Return the teacher's features of images, detached. See Teachers."""
        return self._teach(x_img)

    @torch.no_grad()
    def check(self, x_img: Tensor) -> str:
        """Say how a batch of images lies in the range of the preprocessing. See Teachers."""
        if not isinstance(self.preprocess, Preprocess):
            raise TypeError(
                f"check needs a Preprocess, whose range it knows; preprocess is {type(self.preprocess).__name__}"
            )
        x_img = as_images(x_img)
        check_images(x_img, "x_img")
        return check_values("x_img", x_img, self.preprocess.range_of(x_img.dtype))

    def _teach(self, x_img: Tensor, needs: frozenset[str] | None = None) -> Features:
        """Return the teacher's features. needs: those that are read, by default all, for a teacher that takes it."""
        check_tensor("x_img", x_img)
        check_loaded(self.teacher, x_img)
        if self.teacher.training:  # another module that holds it as a submodule may have set that
            self.teacher.eval()
        weight = next((p for p in self.teacher.parameters() if p.is_floating_point()), None)
        if weight is not None:
            x_img = x_img.to(weight.device, non_blocking=True)
        dtype = None if weight is None else weight.dtype
        x_img = as_images(x_img)
        h, w = x_img.shape[-2:]
        ours = isinstance(self.preprocess, Preprocess)
        # A compiler makes a program for each size that a rule gives.
        ruled = ours and callable(self.img_size)
        size = resolve(self.img_size, index(h), index(w), self.patch_size) if ruled else None
        raw, told = None, {"needs": needs} if self._takes_needs else {}
        if type(self.teacher) is DINOv2Backbone:
            raw = read_raw(self.teacher, self.preprocess, x_img, size)
        if isinstance(raw, Raw):
            size, batch, found = raw.size, len(x_img), self.teacher(x_img, raw=raw, **told)
        else:
            x = self.preprocess(x_img, dtype, size) if ours else self.preprocess(x_img)
            check_tensor("preprocess's result", x)
            size, batch = (x.shape[-2], x.shape[-1]), len(x)
            found = self.teacher(x if dtype is None else x.to(dtype), **told)
        its_layers_alone = bool(told) and needs == {"layers"} and isinstance(found, dict) and "global" not in found
        check = check_layers if its_layers_alone else check_features
        found = check("teacher's result", found, self.teacher.embed_dim, batch)
        grid = self.teacher_grid or (size[0] // self.patch_size, size[1] // self.patch_size)
        features: Features = {} if its_layers_alone else {"global": found["global"], "patch": found.get("patch")}
        features |= {"layers": found["layers"]} if found.get("layers") else {}
        return {**features, "grid": found.get("grid") or grid, "image_size": (h, w)}

    def _check_images(self, x_img: Any, features: Any, name: str = "x_img") -> int:
        """Check that one of the two is given, and return its batch size. name: the images' argument, for errors."""
        if features is not None and x_img is not None:
            raise ValueError(f"give {name} or features, not both: features are what encode({name}) returned")
        if features is not None:
            return len(check_features("features", features, self.teacher.embed_dim)["global"])
        if x_img is None:
            raise ValueError(f"give {name}, the images, or features, what encode returned for them; got neither")
        images = as_images(x_img)
        if isinstance(self.preprocess, Preprocess):
            check_images(images, name)
        check_tensor(name, x_img)
        if not self.stopgrad_image and not x_img.is_floating_point():
            raise ValueError(f"{name} must be floats where stopgrad_image=False: {x_img.dtype} has no gradient")
        return len(images)

    def ready(self, features: Any, device: torch.device) -> Any:
        """Return features on a device, detached with stopgrad_image."""
        stop = self.stopgrad_image
        return map_features(lambda x: x.to(device).detach() if stop else x.to(device), features)

    def _features(
        self, x_img: Any, features: Mapping[str, Any] | None, device: torch.device, needs: frozenset[str]
    ) -> Features:
        """Return the given features, or else those of the images, on the student's device and with their grid.

        They are detached with stopgrad_image. needs: which of them are read.
        """
        if features is None:
            with torch.no_grad() if self.stopgrad_image else nullcontext():
                features = self._teach(x_img, needs)
        ready = self.ready(features, device)
        ready["grid"] = ready.get("grid") or self.teacher_grid
        read = [ready] if "patch" in needs else []
        read += ready.get("layers", {}).values() if "layers" in needs else []
        for patch in (x["patch"] for x in read if x.get("patch") is not None):
            rows, columns = grid_of(ready)
            if patch.shape[1] != rows * columns:
                raise ValueError(
                    f"the features have {patch.shape[1]} patch tokens where img_size={self.img_size} has "
                    f"{rows} x {columns}: give the teacher's patch_size, and strip class and register tokens"
                )
        return ready

    def _find_grid(self, img_size: Any) -> Grid | None:
        """Return the teacher's grid for images of self.img_size, or None for a rule. img_size: as the user wrote it."""
        self.patch_size = patch = read_patch_size(self.teacher)
        built = getattr(self.teacher, "img_size", None)
        if callable(self.img_size):
            if built is not None and not callable(built):
                raise ValueError(f"img_size is {self.img_size} and the teacher was built for {built}")
            return None
        if self.img_size[0] % patch or self.img_size[1] % patch:
            raise ValueError(f"img_size must be a multiple of the teacher's patch size {patch}, got {img_size!r}")
        if built is not None and not callable(built) and check_size(built, "the teacher's img_size") != self.img_size:
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


def as_images(x_img: Any) -> Any:
    """Return frames [B, T, 3, H, W] as images [B T, 3, H, W], and anything else as it is."""
    return x_img.flatten(0, 1) if isinstance(x_img, Tensor) and x_img.ndim == 5 else x_img
