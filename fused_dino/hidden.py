"""Tensors that state_dict() leaves out: a teacher's weights, a loss's options, the weights of a grid.

No checkpoint can bring them back. So `to_empty`, which replaces every tensor of a module by fresh memory, must not
reach them. A copy of a module shares its teacher's memory until one of the two is moved, cast or loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FRESH, SHARED = "_is_fresh_memory", "_shares_memory"  # marks of modules


def keeps_values(fn: Callable[[Tensor], Tensor]) -> tuple[bool, torch.device]:
    """Return whether an `fn` of Module._apply keeps values, as `to` does and `to_empty` does not, and the device.

    It tries `fn` on a pattern that was never in memory before, of numbers that every floating dtype holds.
    """
    pattern = torch.tensor([byte % 8 for byte in os.urandom(64)], dtype=torch.float32, device="cpu")
    result = fn(pattern)
    return not result.is_meta and torch.equal(result.detach().to("cpu", torch.float32), pattern), result.device


def move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Move a tensor to the device of `fn`, without its other changes. The meta device is ignored."""
    device = keeps_values(fn)[1]
    return tensor if device.type == "meta" else tensor.to(device)


def apply_to_teacher(teacher: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply `fn` to a hidden teacher, or move its values alone where `fn` would lose them."""
    keeps, device = keeps_values(fn)
    if keeps:
        teacher._apply(lambda x: x if x.is_meta else fn(x))
    elif device.type == "meta":
        teacher.to(device)
    else:
        if any(x.is_meta for x in (*teacher.parameters(), *teacher.buffers())):
            mark_fresh(teacher)
        teacher._apply(lambda x: fn(x) if x.is_meta else x.to(device))


def mark_fresh(teacher: nn.Module) -> None:
    """Mark a teacher whose memory was never written, until it is loaded."""
    setattr(teacher, FRESH, True)
    weights = list(teacher.parameters())
    parts = [part for part in (teacher, *teacher.children()) if len(list(part.parameters())) == len(weights)]
    if isinstance(model := teacher.__dict__.get("model"), nn.Module):
        parts = [model]
    for part in parts:  # a wrapper's model holds all that there is to load
        part.register_load_state_dict_pre_hook(partial(unmark, teacher))


def unmark(teacher: nn.Module, part: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if any(key.startswith(prefix) for key in state_dict):
        teacher.__dict__.pop(FRESH, None)


def check_loaded(teacher: nn.Module, images: Tensor) -> None:
    """Refuse a teacher that was built on the meta device, and has no weights yet."""
    weight = next(teacher.parameters(), images)
    if FRESH in teacher.__dict__ or (weight.is_meta and not images.is_meta):
        raise RuntimeError(
            "the teacher has no weights: it was built on the meta device, and no checkpoint of the model holds it; "
            "build it outside, or load it: teacher.to_empty(device=...), then teacher.load_state_dict(...)"
        )


def parts_of(teacher: nn.Module) -> Iterator[nn.Module]:
    """Yield all modules of a teacher, and those of a `model` that one of them holds outside of its submodules."""
    for part in teacher.modules():
        yield part
        if isinstance(model := part.__dict__.get("model"), nn.Module):
            yield from model.modules()


def share(teacher: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy of a teacher share its memory: `memo` gets tensors of their own over the same storage."""
    for part in parts_of(teacher):
        for p in part._parameters.values():
            if type(p) is nn.Parameter:
                memo.setdefault(id(p), nn.Parameter(p.detach(), requires_grad=p.requires_grad))
        for x in part._buffers.values():
            if type(x) is Tensor:
                memo.setdefault(id(x), x.detach())


def own_before_loading(teacher: nn.Module) -> None:
    """Let a teacher that shares its memory take memory of its own before it loads values in place."""
    for part in parts_of(teacher):
        if SHARED not in part.__dict__:
            part.register_load_state_dict_pre_hook(own)
        setattr(part, SHARED, True)


def own(part: nn.Module, *_: Any) -> None:
    if not part.__dict__.get(SHARED):
        return
    setattr(part, SHARED, False)
    for p in part._parameters.values():
        if p is not None:
            p.data = p.data.clone()
    part._buffers.update({name: None if x is None else x.clone() for name, x in part._buffers.items()})
