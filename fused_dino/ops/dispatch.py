"""What every op needs on its way to torch's dispatcher, to autograd and to a CPU's cache: written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor

NAMESPACE = "fused_dino"
CPU_ROWS = 256  # of some thousand columns: what one step makes of them is still in a core's cache for the next
library = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """The opaque op of `schema`, "name(Tensor x, ...) -> Tensor", run by `launch`, shaped by `fake`; "!" in it
    marks what it changes in place.

    It has no gradient of its own: the op's autograd.Function has, and differentiating the op itself is refused, where
    torch 2.11 would return zeros. The CPU key serves the interpreter alone; the choice of a backend sees to that.
    """
    name = schema.partition("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):  # ROCm registers as CUDA too
        library.impl(name, launch, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    if "!" not in schema:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse_gradient, lib=library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def refuse_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError("this op has no gradient of its own; differentiate the function of fused_dino.functional")


def keep_signature(function: type[torch.autograd.Function]) -> Any:
    """An autograd.Function whose forward keeps its signature: torch binds each call's arguments by it, and would take
    longer to make it anew than a launch takes."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def batched_rows(batch_size: int, in_dims: tuple, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Under vmap, [B, N, D] as [B * N, D]: an op on rows needs no rule but this."""

    def flat(x: Tensor | None, dim: int | None) -> Tensor | None:
        if x is None:
            return None
        return (x.expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

    return tuple(map(flat, tensors, in_dims))


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Tensors [N, D] whose last dimension is contiguous, which is all that the kernels ask."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def is_batched(x: Tensor) -> bool:
    """Whether x is under one of torch's two vmaps, of which the older serves is_grads_batched; a torch.func.grad around
    it, which has no storage to show either, is looked through."""
    if not torch.compiler.is_compiling():  # Dynamo traces neither of the two
        while torch._C._functorch.is_gradtrackingtensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    try:
        return x.untyped_storage() is None
    except NotImplementedError:
        return True


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def acc_of(dtype: torch.dtype) -> Any:
    """What a kernel computes in, for results of `dtype`."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def blocks(x: Tensor, size: int = CPU_ROWS) -> Iterator[slice]:
    """Even blocks of some `size` rows of x, on a CPU; all rows at once where a compiler fuses, and where a launch costs
    more than memory."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        yield slice(None)
        return
    step = max(1, cdiv(x.shape[0], max(1, (x.shape[0] + size // 2) // size)))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def by_rows(function: Callable[..., tuple], outputs: tuple[Tensor, ...], *rows: Tensor, block: int = CPU_ROWS) -> tuple:
    """function(*rows), in blocks written into `outputs`.

    `function` makes each row of its results from the same row of its arguments.
    """
    parts = list(blocks(rows[0], block))
    if len(parts) == 1:
        return tuple(x.to(out.dtype) for x, out in zip(function(*rows), outputs, strict=True))
    for part in parts:
        for out, made in zip(outputs, function(*(x[part] for x in rows)), strict=True):
            out[part] = made
    return outputs
