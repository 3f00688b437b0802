"""The features that a teacher makes of images, and that terms compare with a student's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypedDict

from torch import Tensor

from .validation import check_size

Grid = tuple[int, int]  # (rows, columns)
Features = TypedDict(
    "Features",
    {"global": Tensor, "patch": Tensor | None, "grid": Grid, "image_size": Grid, "layers": dict[int, "Features"]},
    total=False,
)
"""The features of B images, of which a teacher may leave out what it does not have.

global [B, D]; patch [B, N, D] or None, row by row; grid: the rows and columns of patch; image_size: the height and
width of the images before preprocessing; layers: {'global', 'patch'} of the layers that the teacher was asked for.
"""


def check_features(name: str, features: Any, width: int, batch: int | None = None) -> Features:
    """Check features and return them. name: the argument, for errors; width: D; batch: B, if it is known."""
    expected = f"{name} must be {{'global': [B, {width}], 'patch': [B, N, {width}] or None}}"
    if not isinstance(features, dict) or not isinstance(features.get("global"), Tensor):
        raise TypeError(f"{expected}, got {type(features).__name__}")
    token, patch = features["global"], features.get("patch")
    if patch is not None and not isinstance(patch, Tensor):
        raise TypeError(f"{expected}, got a patch that is a {type(patch).__name__}")
    shapes = [list(x.shape) for x in (token, patch) if x is not None]
    if any(shape != [len(token), *shape[1:-1], width] or len(shape) != n for n, shape in enumerate(shapes, 2)):
        raise ValueError(f"{expected}, got shapes {shapes}")
    if batch is not None and len(token) != batch:
        raise ValueError(f"{expected} with B = {batch}, got shapes {shapes}")
    if not all(x.is_floating_point() for x in (token, patch) if x is not None):
        raise ValueError(f"{expected} of floats, got {token.dtype}{'' if patch is None else f' and {patch.dtype}'}")
    if patch is not None and features.get("grid") is not None:
        rows, columns = check_size(features["grid"], f"the grid of {name}")
        if patch.shape[1] != rows * columns:
            raise ValueError(f"{name} has {patch.shape[1]} patch tokens on a grid of {rows} x {columns}")
    return check_layers(name, features, width, len(token))


def check_layers(name: str, features: Any, width: int, batch: int) -> Features:
    """Check the features of layers, where there are any, and return all features."""
    layers = features.get("layers", {})
    if not isinstance(layers, dict):
        raise TypeError(f"the layers of {name} must be a dict of features by int, got {type(layers).__name__}")
    for n, layer in layers.items():
        its = layer | {"grid": features.get("grid")} if isinstance(layer, dict) else layer
        check_features(f"layer {n} of {name}", its, width, batch)
    return features


def map_features(change: Callable[[Tensor], Tensor], features: Mapping[str, Any]) -> Any:
    """Return features with every tensor changed, those of the layers, too."""
    return {
        name: change(x) if isinstance(x, Tensor) else map_features(change, x) if isinstance(x, Mapping) else x
        for name, x in features.items()
    }


def grid_of(features: Features) -> Grid:
    """Return the grid of the patch tokens, or raise ValueError where the features do not carry it."""
    grid = features.get("grid")
    if grid is None:
        raise ValueError("features must have 'grid', the (rows, columns) of their patch tokens, as encode returns them")
    return grid[0], grid[1]
