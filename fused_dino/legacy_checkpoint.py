"""Loading of checkpoints of the code that a supervision replaces, by renaming their keys.

The seed, the eager code that DinoSupervision replaces, keeps `dino_t_head`, `dino_local_head` and the teacher,
`dino_model`, as attributes of the user's own model; REPA keeps `projectors`. Here they live in one submodule of it. So
the keys are searched for at a supervision's prefix and at its parent's.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class Legacy(NamedTuple):
    """The names in checkpoints of other code: whose code it is, the renamed keys, and the one that is dropped."""

    whose: str
    renamed: dict[str, str]
    dropped: str | None = None


def adopt(module: Any, state_dict: dict[str, Any], prefix: str, theirs: str, taken: Any = ()) -> None:
    """Rename keys under `theirs` in place to those of `module` under `prefix` by its `legacy`, and warn of what it did.

    taken: names under `theirs` that belong to other modules, whose keys stay. A key that fits nothing, such as that of
    a local head where the module has none, stays too, and strict loading reports it.
    """
    if module.legacy is None:
        return
    whose, renamed, gone = module.legacy
    parts = {name for name, _ in module.named_modules()}
    moved, dropped = 0, 0
    for key in list(state_dict):
        rest = key.removeprefix(theirs)
        first = rest.partition(".")[0]
        if not key.startswith(theirs) or first == rest or first in taken:
            continue
        if first == gone:
            del state_dict[key]
            dropped += 1
        for old, name in renamed.items():
            new = prefix + name + rest.removeprefix(old)
            if rest.startswith(f"{old}.") and name in parts and new not in state_dict:
                state_dict[new] = state_dict.pop(key)
                moved += 1
    if not moved and not dropped:
        return
    message = f"loading a checkpoint of {whose}: {moved} tensors renamed"
    if dropped:
        message += f", {dropped} of {theirs}{gone} dropped (the teacher is loaded on its own)"
    step = f"{prefix}schedule.step"
    if moved and step not in state_dict:
        state_dict.update(module.schedule.state_dict(prefix=f"{prefix}schedule."))
        message += f"; it holds no {step}, so that the warm-up goes on from this module's own"
    warnings.warn(message, stacklevel=2)


def adopt_from_parent(parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Run `adopt` before the parent's load_state_dict, unless it has two supervisions: keys would be ambiguous."""
    children = {name: child for name, child in parent._modules.items() if child is not None and is_supervision(child)}
    if len(children) == 1:
        ((name, child),) = children.items()
        adopt(child, state_dict, f"{prefix}{name}.", prefix, taken=parent._modules)


def is_supervision(module: nn.Module | None) -> bool:
    return getattr(module, "legacy", None) is not None


@cache
def watch_parents() -> None:
    """Make every module that is later given a supervision as a child load its legacy names too.

    torch passes a child only the keys under its own prefix, so the parent has to rename them. A module cannot find its
    parent in another way.
    """

    def on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        hooks = parent._load_state_dict_pre_hooks.values()
        if is_supervision(child) and not any(getattr(x, "hook", None) is adopt_from_parent for x in hooks):
            parent.register_load_state_dict_pre_hook(adopt_from_parent)

    register_module_module_registration_hook(on_registration)
