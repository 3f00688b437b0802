"""Registers fused_dino's modules with mmengine, so that configs build them: import this module, or call `register`.

custom_imports = dict(imports=["fused_dino.integrations.mmengine"])
model = dict(type="MyModel", dino=dict(type="DinoSupervision", in_dim=8192, teacher_dtype="bfloat16"))

A config with classes as types imports them from this module, which builds the dicts among their arguments:

from fused_dino.integrations.mmengine import DinoSupervision
dino = dict(type=DinoSupervision, in_dim=8192, loss_type=dict(type="VICRegLoss"))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS, Registry

import fused_dino as fd

MODULES: dict[str, type[Any]] = {
    module.__name__: module
    for module in (
        fd.DinoSupervision, fd.Supervision, fd.GlobalTerm, fd.RegionTerm, fd.TokenTerm, fd.Schedule, fd.Weight,
        fd.AtStep, fd.BySimilarity, fd.DINOv2Backbone, fd.Projector, fd.Preprocess, fd.CosineLoss, fd.MSELoss,
        fd.VICRegLoss, fd.Scaled, fd.Area,
    )
}  # fmt: skip


def __getattr__(name: str) -> Callable[..., Any]:
    """Return the builder of a module, for a config that imports its types."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return builder(MODULES[name], MODELS)


def register(registry: Registry) -> None:
    """Register every module in a registry under its class's name. A second call changes nothing.

    Args:
        registry (mmengine.registry.Registry): Any registry, such as xtuner's ``BUILDER``. Dicts with a ``type`` among a
            module's arguments are built in it, too. Dtypes may be given by name.

    Raises:
        KeyError: If the registry has another module of such a name.

    Example:
        >>> registry = Registry("builder")
        >>> register(registry)
        >>> registry.build(dict(type="VICRegLoss", gamma=2.0)).options["gamma"]
        2.0
    """
    for name, module in MODULES.items():
        again = getattr(registry.module_dict.get(name), "__module__", None) == __name__
        registry.register_module(name=name, module=builder(module, registry), force=again)


def builder(module: type[Any], registry: Registry) -> Callable[..., Any]:
    """Return what a registry calls in the module's place: arguments that are configs are built first."""

    def build(*args: Any, **options: Any) -> Any:
        return module(*args, **{name: built(name, value, registry) for name, value in options.items()})

    build.__name__ = build.__qualname__ = module.__name__
    build.__doc__ = module.__doc__
    return build


def built(name: str, value: Any, registry: Registry) -> Any:
    if isinstance(value, dict) and "type" in value:
        return registry.build(value)
    if isinstance(value, dict):  # the terms of a supervision, by name
        return {key: built(key, part, registry) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(built(name, part, registry) for part in value)
    return dtype_of_name(name, value) if name.endswith("dtype") and isinstance(value, str) else value


def dtype_of_name(argument: str, name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{argument} is {name!r}, which is no dtype of torch's; use one such as 'bfloat16'")
    return dtype


def history_method(owner: Any, name: str) -> Any:
    """Replace getattr in checkpoints: a history of mmengine names its own statistics by it."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(f"{name!r} of {owner!r} is no statistic of a history")
    return getattr(owner, name)


def allow_histories() -> None:
    """Let torch.load read mmengine's logs: its resume loads whole checkpoints, and torch refuses unknown classes."""
    array: Any = np.zeros(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64)]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, (history_method, "builtins.getattr"), np.ndarray, np.dtype, array, scalar, *dtypes]
    )


register(MODELS)
allow_histories()
