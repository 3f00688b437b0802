"""Which of the teacher's features a term reads: the last ones, those of a layer, or the sum of several layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..features import Features
from ..reference.dtypes import upcast


def check_layer(layer: Any) -> tuple[int, ...]:
    """Return the layers of a term's argument `layer`; none for None."""
    if layer is None:
        return ()
    several = isinstance(layer, Sequence) and not isinstance(layer, (str, bytes))
    layers = tuple(layer) if several else (layer,)
    if not layers or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in layers):
        raise ValueError(f"layer must be None, an int or a sequence of ints that are summed, got {layer!r}")
    return tuple(map(int, layers))


def choose(features: Features, layers: Sequence[int], reads: Collection[str]) -> Features:
    """Return the features with the sum of these layers in place of the last, or as they are where layers is empty.

    reads: which of "global" and "patch" are summed. The global token replaces missing patch tokens.
    """
    if not layers:
        return features
    found: Mapping[int, Any] = features.get("layers") or {}
    if missing := sorted(n for n in layers if n not in found):
        raise ValueError(
            f"layer {', '.join(map(str, missing))} is not among the features, which have {sorted(found) or 'none'}: "
            f"build their teacher with layers={tuple(layers)}"
        )
    several = [found[n] for n in layers]
    patches = [x.get("patch") for x in several]
    patch = add(patches) if "patch" in reads and all(x is not None for x in patches) else None
    return {**features, "global": add([x["global"] for x in several]), "patch": patch}


def add(several: Sequence[Any]) -> Tensor:
    """Return the sum of tensors. Several are added in float32, or in float64 for float64."""
    return several[0] if len(several) == 1 else reduce(torch.add, upcast(*several))
