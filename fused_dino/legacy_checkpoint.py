"""Loads checkpoints of the seed, the eager code that DinoSupervision replaces: renames their keys while they load.

The seed keeps `dino_t_head`, `dino_local_head` and the teacher, `dino_model`, as attributes of the user's own model.
Here they live in one submodule of it. So the keys are looked for at a DinoSupervision's prefix and at its parent's.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

RENAMED = {"dino_t_head": "projector", "dino_local_head": "local_projector"}
DROPPED = "dino_model"


def adopt(module: nn.Module, state_dict: dict[str, Any], prefix: str, theirs: str, taken: Any = ()) -> None:
    """Renames in place the seed's keys under `theirs` to those of `module` under `prefix`, and says what it did.

    taken: names under `theirs` that belong to other modules, and are left alone. A key without a place, such as the
    local head of a module that has none, stays, and strict loading reports it.
    """
    moved, dropped = 0, 0
    for key in list(state_dict):
        name, _, rest = key.removeprefix(theirs).partition(".")
        if not key.startswith(theirs) or not rest or name in taken:
            continue
        new = f"{prefix}{RENAMED.get(name)}.{rest}"
        if name == DROPPED:
            del state_dict[key]
            dropped += 1
        elif RENAMED.get(name) in module._modules and new not in state_dict:
            state_dict[new] = state_dict.pop(key)
            moved += 1
    if not moved and not dropped:
        return
    message = f"loading a checkpoint of the seed: {moved} tensors renamed"
    if dropped:
        message += f", {dropped} of {theirs}{DROPPED} dropped (the teacher is loaded on its own)"
    step = "schedule.step"
    if moved and prefix + step not in state_dict:
        state_dict[prefix + step] = module.get_buffer(step).clone()
        message += f"; it holds no {prefix}{step}, so that the warm-up goes on from this module's own"
    warnings.warn(message, stacklevel=2)


def adopt_from_parent(parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of the parent's load_state_dict. Two supervisions make the seed's keys ambiguous, and they stay."""
    children = {name: child for name, child in parent._modules.items() if child is not None and is_supervision(child)}
    if len(children) == 1:
        ((name, child),) = children.items()
        adopt(child, state_dict, f"{prefix}{name}.", prefix, taken=parent._modules)


def is_supervision(module: nn.Module | None) -> bool:
    return getattr(type(module), "loads_legacy", False)


@cache
def watch_parents() -> None:
    """Makes every module that gets a supervision as its child load the seed's names too, from now on.

    torch hands a child only the keys under its own prefix, so that the parent has to rename them, and a module learns
    of its parent in no other way.
    """

    def on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        hooks = parent._load_state_dict_pre_hooks.values()
        if is_supervision(child) and not any(getattr(x, "hook", None) is adopt_from_parent for x in hooks):
            parent.register_load_state_dict_pre_hook(adopt_from_parent)

    register_module_module_registration_hook(on_registration)
