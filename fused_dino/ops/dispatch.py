"""How a Triton launcher becomes an op that torch.compile, export and opcheck know: once, for every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

NAMESPACE = "fused_dino"
library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The opaque op of `schema`, "name(Tensor x, ...) -> Tensor", run by `launch` and shaped by `fake`.

    It has no gradient of its own: the op's autograd.Function has, and differentiating the op itself is refused, where
    torch 2.11 would return zeros. The CPU key serves the interpreter alone; the choice of a backend sees to that.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):  # ROCm registers as CUDA too
        library.impl(name, launch, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse_gradient, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def refuse_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError("this op has no gradient of its own; differentiate the function of fused_dino.functional")


def batched_rows(batch_size: int, in_dims: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Under vmap, [B, N, D] as [B * N, D]: an op on rows needs no rule but this."""
    whole = (
        x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=False)
    )
    return tuple(x.flatten(0, 1) for x in whole)
