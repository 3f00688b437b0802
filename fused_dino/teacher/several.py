"""The teachers of a supervision: one, several by name, or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .held import Taught, as_images

Name = str | None  # of a teacher; one alone has none
DEFAULTS: dict[str, Any] = {"img_size": None, "preprocess": "bilinear", "input_range": None}


class Teachers(Taught):
    """Holds one teacher as Taught does, or several by name, each in a Taught of its own, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.teachers: nn.ModuleDict | None = None  # one alone is held here

    def sources(self) -> dict[Name, Any]:
        """Return what holds each teacher, by its name."""
        return {None: self} if self.teachers is None else dict(self.teachers.items())

    def several(self) -> dict[Name, Any]:
        if not self.teachers:
            raise ValueError("images need a teacher, and this supervision has teacher=None: each term gets its target")
        return self.sources()

    def hold_all(self, teacher: Any, layers: Mapping[Name, Collection[int]], backend: Any, **options: Any) -> None:
        """Take a teacher, a dict of them by name, or None.

        layers: those that each must return; options: those of DEFAULTS, each one value for all, or a dict by name.
        """
        several = isinstance(teacher, Mapping)
        names = check_names(teacher) if several else []
        for key, value in options.items():
            if isinstance(value, Mapping) and (not several or not value.keys() <= {*names}):
                known = f"the names of the teachers, {', '.join(names)}" if several else "one value, for one teacher"
                raise ValueError(f"{key} must have {known}, got {sorted(map(str, value))}")
        if teacher is not None and not several:
            self.hold(teacher, layers.get(None, ()), backend, **options)
            return
        if teacher is None and options != DEFAULTS:
            name = next(key for key, value in options.items() if value != DEFAULTS[key])
            raise ValueError(f"{name} must be left out with teacher=None, which has no input")
        self.teachers = nn.ModuleDict()
        for name in names:
            own = {k: x.get(name, DEFAULTS[k]) if isinstance(x, Mapping) else x for k, x in options.items()}
            self.teachers[name] = one = Taught()
            one.stopgrad_image = self.stopgrad_image
            one.hold(teacher[name], layers.get(name, ()), backend, **own)

    @torch.no_grad()
    def encode(self, x_img: Tensor) -> Any:
        """Returns the teacher's features of images, detached: cache them, or compute them ahead.

        Args:
            x_img (Tensor): Images [B, 3, H, W] of any size, or frames [B, T, 3, H, W], which count as B T images. They
                are floats in -1..1 or uint8 in 0..255 unless ``input_range`` or ``preprocess`` says otherwise, and are
                moved to the teacher's device.

        Returns:
            dict: ``'global'`` [B, D] and ``'patch'`` [B, N, D] or None, in the teacher's dtype; ``'grid'``, the rows
            and columns of the patch tokens; ``'image_size'``, the height and width of the images; ``'layers'``, if the
            teacher returns them. Several teachers give a dict of such dicts by name.

        Raises:
            ValueError: If the images, or the teacher's result, are not of these shapes. The message names them.
            TypeError: If ``x_img`` is no tensor.
        """
        if self.teachers is None:
            return super().encode(x_img)
        return {name: one.encode(x_img) for name, one in self.several().items()}

    def check(self, x_img: Tensor) -> str:
        """Says how a batch of images lies in ``input_range``. Call it once, before training: it waits for the device.

        Args:
            x_img (Tensor): Images, as for ``encode``.

        Returns:
            str: A sentence with the least and the largest value, and the share that lies outside; one sentence for each
                teacher.

        Raises:
            ValueError: If values are not finite, if over 1% lie outside, or if all lie in one half of the range, as
                0..1 does in -1..1.
            TypeError: If ``preprocess`` is no Preprocess, whose range is not known here.
        """
        if self.teachers is None:
            return super().check(x_img)
        return "; ".join(f"{name}: {one.check(x_img)}" for name, one in self.several().items())

    def check_inputs(self, images: Any, features: Any, names: Collection[Name], argument: str) -> int | None:
        """Check the images, or the features, that these teachers need. Return their number, or None without either.

        argument: the name of images, for errors.
        """
        sources = self.sources()
        if self.teachers is None and (names or images is not None or features is not None):
            return self._check_images(images, features, argument)
        if features is not None and not (
            isinstance(features, Mapping)
            and all(name in features for name in names)
            and all(name in sources for name in features)
        ):
            got = sorted(map(str, features)) if isinstance(features, Mapping) else type(features).__name__
            raise ValueError(
                f"features must be a dict with those of each of the teachers {sorted(map(str, names))}, got {got}"
            )
        if not sources and images is not None:
            raise ValueError(f"{argument} must be left out with teacher=None: each term has its target")
        if not names:
            return None if images is None else len(as_images(images))
        several = {n: sources[n]._check_images(images, features and features[n], argument) for n in names}
        batch = next(iter(several.values()))
        if {*several.values()} != {batch}:
            raise ValueError(f"features must be of the same images, got {several} of them")
        return batch

    def features_of(
        self, images: Any, features: Any, device: torch.device, needs: Mapping[Name, frozenset[str]]
    ) -> Any:
        """Return by name the features of the teachers that are needed. needs: what is read of each."""
        sources = self.sources()
        by_name = {None: features} if self.teachers is None else features or {}
        return {n: sources[n]._features(images, by_name.get(n), device, its) for n, its in needs.items()}


def check_names(teachers: Mapping[Any, Any]) -> list[str]:
    """Return the names of teachers, which are those of modules."""
    if not teachers:
        raise ValueError("teacher must be a model's name, a module, a dict of at least one by name, or None, got {}")
    for name in teachers:
        if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(f"teacher must have names that are identifiers, and no dict's, got {name!r}")
    return list(teachers)
