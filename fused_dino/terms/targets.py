"""A target of a call, such as an EMA's hidden states, as the features that a term reads in place of a teacher's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from ..features import Features
from ..validation import check_size

RANKS = {"global": 2, "patch": 3}


def read_target(name: str, target: Any, reads: Collection[str], width: int | None) -> Features:
    """Return a target of a call as features, or raise an error that names it.

    reads: which of "global" and "patch" the term reads; width: D, where it is known. See Supervision.forward.
    """
    expected = " and ".join(f"{key!r} [B, {'N, ' * (key == 'patch')}{width or 'D'}]" for key in sorted(reads))
    if not isinstance(target, (Tensor, Mapping)):
        raise TypeError(f"{name} must be a tensor, or a dict of {expected}, got {type(target).__name__}")
    found = from_tensor(target, reads, width) if isinstance(target, Tensor) else dict(target)
    tensors = {key: x for key, x in found.items() if key != "grid"}
    fits = all(key in tensors for key in reads) and all(key in RANKS for key in tensors)
    if not fits or not all(isinstance(x, Tensor) for x in tensors.values()):
        raise ValueError(f"{name} must be a dict of {expected}, and 'grid' if need be, got {sorted(map(str, found))}")
    shapes = {key: list(x.shape) for key, x in tensors.items()}
    fits = all(
        x.ndim == RANKS[key] and x.is_floating_point() and width in (None, x.shape[-1]) for key, x in tensors.items()
    )
    if not fits or len({len(x) for x in tensors.values()}) != 1:
        dtypes = {str(x.dtype) for x in tensors.values()}
        raise ValueError(f"{name} must be floats of {expected}, got {', '.join(sorted(dtypes))} of {shapes}")
    if found.get("grid") is not None and "patch" in tensors:
        rows, columns = found["grid"] = check_size(found["grid"], f"the grid of {name}")
        if shapes["patch"][1] != rows * columns:
            raise ValueError(f"{name} has {shapes['patch'][1]} tokens on a grid of {rows} x {columns}")
    return found  # type: ignore[return-value]


def from_tensor(x: Tensor, reads: Collection[str], width: int | None) -> dict[str, Any]:
    """Return what a term reads of one tensor. A map says its grid; a class token comes before the patches."""
    if "patch" not in reads or x.ndim not in (3, 4):
        return dict.fromkeys(reads, x)
    if x.ndim == 4 and x.shape[1] == width and "global" not in reads:
        return {"patch": rearrange(x, "b d h w -> b (h w) d"), "grid": (x.shape[2], x.shape[3])}
    x = x.flatten(0, -3)
    return {"patch": x} if "global" not in reads else {"global": x[:, 0], "patch": x[:, 1:]}
