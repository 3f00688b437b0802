"""Ops of torch's dispatcher, made from a function that allocates their results and one that fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .plain import is_plain

NAMESPACE = "fused_dino"
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
}
Shape = tuple[Any, ...]
library = torch.library.Library(NAMESPACE, "FRAGMENT")


def digest(folder: Path) -> str:
    """Return an identifier that changes with the Python files in `folder`."""
    text = sha256()
    for file in sorted(folder.glob("*.py")):
        text.update(file.read_bytes())
    return f"sources_{text.hexdigest()[:16]}"


OVERLOAD = digest(Path(__file__).parent)


class Op:
    """The opaque op `name`: `run` computes its results, and `empty` makes them without their values.

    Its arguments are written once: as the annotated parameters of `empty`. A NamedTuple among them passes the
    dispatcher as its fields. An op whose name ends in "_" changes its first argument, and returns None.

    Its overload is named after the sources of all ops. torch's caches of compiled graphs know an op by its name alone
    (https://github.com/pytorch/pytorch/issues/160472), so after an update they would call it with the old results.

    It has no gradient of its own: that is in the op's autograd.Function. Differentiating the dispatcher's op raises,
    where torch 2.11 would return zeros. The CPU key serves the interpreter alone, as the choice of a backend ensures.
    """

    def __init__(self, name: str, empty: Callable[..., Any], run: Callable[..., Any]) -> None:
        parameters = get_type_hints(empty)
        returns = parameters.pop("return")
        self.run, self.shape = run, shape_of(parameters)
        arguments = ", ".join(schema_of(parameters))
        if name.endswith("_"):
            arguments = arguments.replace("Tensor", "Tensor(a!)", 1)
        qualified = f"{name}.{OVERLOAD}"
        library.define(f"{qualified}({arguments}) -> {schema_of_results(returns)}", tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CUDA", "CPU"):  # ROCm registers as CUDA too
            library.impl(qualified, lambda *values: run(*whole(self.shape, backwards(values))), device)
        torch.library.register_fake(
            f"{NAMESPACE}::{qualified}", lambda *values: empty(*whole(self.shape, backwards(values))), lib=library
        )
        if not name.endswith("_"):
            torch.library.register_autograd(f"{NAMESPACE}::{qualified}", refuse_gradient, lib=library)
        self.overload = getattr(getattr(getattr(torch.ops, NAMESPACE), name), OVERLOAD)

    def __call__(self, *args: Any) -> Any:
        if is_plain(args) and not torch.is_grad_enabled():
            return self.run(*args)
        return self.overload(*flat(self.shape, args))


def launched(name: str, empty: Callable[..., Any], launch: Callable[..., None]) -> Op:
    """Make the op whose results `empty` allocates and `launch(results, ...)` fills."""

    def run(*args: Any) -> Any:
        out = empty(*args)
        launch(out, *args)
        return out

    return Op(name, empty, run)


def fields_of(kind: Any) -> dict[str, Any]:
    """Return the fields of a NamedTuple and their types, or an empty dict for another type."""
    return get_type_hints(kind) if hasattr(kind, "_fields") else {}


def shape_of(parameters: dict[str, Any]) -> Shape:
    """Return for each parameter None, or a NamedTuple's class and the shape of its fields."""
    return tuple((kind, shape_of(fields)) if (fields := fields_of(kind)) else None for kind in parameters.values())


def schema_of(parameters: dict[str, Any]) -> Iterator[str]:
    """Yield the schema's text of each argument that the dispatcher sees."""
    for name, kind in parameters.items():
        if fields := fields_of(kind):
            yield from schema_of(fields)
        elif get_origin(kind) is tuple:
            yield f"{SCHEMA_TYPES[get_args(kind)[0]]}[] {name}"
        else:
            yield f"{SCHEMA_TYPES[kind]} {name}"


def schema_of_results(kind: Any) -> str:
    """Return the schema's text of the results."""
    several = tuple(fields_of(kind).values()) or get_args(kind)
    if several:
        return f"({', '.join('Tensor' for _ in several)})"
    return "()" if kind is type(None) else "Tensor"


def flat(shape: Shape, args: tuple) -> list[Any]:
    """Return the arguments as the dispatcher takes them."""
    out: list[Any] = []
    for part, value in zip(shape, args, strict=True):
        if part is None:
            out.append(value)
        else:
            out.extend(flat(part[1], value) if any(part[1]) else value)  # torch 2.11 compiles no += of a NamedTuple
    return out


def backwards(values: tuple) -> list[Any]:
    """Return the arguments in reverse, with lists of the dispatcher as tuples."""
    return [tuple(x) if type(x) is list else x for x in reversed(values)]


def whole(shape: Shape, values: list[Any]) -> list[Any]:
    """Return the arguments as the op's functions take them, popped from `values`, which is reversed."""
    out: list[Any] = []
    for part in shape:
        out.append(values.pop() if part is None else part[0](*whole(part[1], values)))
    return out


def refuse_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError("this op has no gradient of its own; differentiate the function of fused_dino.functional")


def rows_of(*tensors: Tensor) -> list[Tensor]:
    """Return tensors [N, D] with a contiguous last dimension, the only layout that the kernels need."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@cache
def acc_of(dtype: torch.dtype) -> Any:
    """Return the dtype in which a kernel computes results of `dtype`."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32
