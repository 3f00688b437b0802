"""The choice of an implementation for each call.

The order: the call's own `backend=`, then `use_backend`, then the environment variable FUSED_DINO_BACKEND, then auto.
An explicit choice never falls back: it runs or raises.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from .ops.plain import forward_mode
from .registry import OPS

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("auto", "reference", "torch", "triton")
VARIABLE = "FUSED_DINO_BACKEND"

_selected: str | None = None  # a plain global: a ContextVar breaks full-graph compilation on torch 2.11


def check_backend(name: str, where: str = "backend") -> str:
    """Return `name`, or raise ValueError with `where` it came from and the known backends."""
    if name not in BACKENDS:
        raise ValueError(f"{where} is {name!r}, which is no backend; use one of {', '.join(BACKENDS)}")
    return name


def on_reference(options: dict[str, Any]) -> dict[str, Any]:
    """Return a module's options with the reference as backend, for a trial run at construction.

    A module may be constructed without the device that its own backend needs.
    """
    if options.get("backend") is not None:
        check_backend(options["backend"])
    return {**options, "backend": "reference"}


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Sets the backend of the calls in a ``with`` block that name none themselves.

    The choice holds for the process, not for the thread.

    Args:
        name (str): ``"auto"`` (triton on a GPU, torch elsewhere), ``"reference"`` (eager formulas, the specification),
            ``"torch"`` (closed forms in plain PyTorch) or ``"triton"``.

    Raises:
        ValueError: If the name is unknown. A backend that cannot run an op raises where the op is called.

    Example:
        >>> with use_backend("reference"):
        ...     choice = requested(None)
        >>> choice
        ('reference', 'use_backend')
    """
    global _selected
    previous, _selected = _selected, check_backend(name)
    try:
        yield
    finally:
        _selected = previous


def requested(backend: str | None) -> tuple[str, str]:
    """Return the backend that was chosen, and where."""
    if backend is not None:
        return check_backend(backend), "the argument backend="
    if _selected is not None:
        return _selected, "use_backend"
    if variable := os.environ.get(VARIABLE):
        return check_backend(variable, f"the environment variable {VARIABLE}"), f"the environment variable {VARIABLE}"
    return "auto", "default"


def choose(op: str, tensor: Tensor, backend: str | None = None) -> tuple[str, Callable[..., Any]]:
    """Return the implementation that `op` runs on `tensor`, by name and as a function, or raise if it cannot run."""
    name = decide(op, tensor, backend)[0]
    return name, getattr(OPS[op], name)


def explain_backend(op: str, tensor: Tensor, backend: Backend | None = None) -> str:
    """Says in one line which implementation an op would run on a tensor, and why.

    Args:
        op (str): ``"preprocess"``, ``"cosine_loss"``, ``"mse_loss"``, ``"vicreg_loss"``, or ``"vicreg_loss(group)"``
            for the rows of a process group of two or more ranks.
        tensor (Tensor): What the op would run on.
        backend (str, optional): As in the op's call. Default: see ``use_backend``.

    Returns:
        str: A line that begins with the implementation's name. It begins with ``none`` where the choice cannot run, and
        holds the error that the call would raise.

    Raises:
        ValueError: If the op or the backend is unknown.
        TypeError: If ``tensor`` is no tensor.

    Example:
        >>> import torch
        >>> explain_backend("cosine_loss", torch.ones(2, 8), backend="reference")
        'reference: reference by the argument backend='
    """
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op is {op!r}; use one of {', '.join(OPS)}")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensor is a {type(tensor).__name__}; give the tensor that the op would run on")
    try:
        name, reason = decide(op, tensor, backend)
    except (NotImplementedError, RuntimeError) as error:
        return f"none: {error}"
    return f"{name}: {reason}"


def decide(op: str, tensor: Tensor, backend: str | None) -> tuple[str, str]:
    """Return (implementation, reason).

    An explicit choice that cannot run raises: NotImplementedError where the op has no such implementation, RuntimeError
    where this machine or this tensor cannot run it.
    """
    name, source = requested(backend)
    reason = f"{name} by {source}"
    if name == "reference":
        return name, reason
    if name == "triton":
        if OPS[op].triton is None:
            raise NotImplementedError(
                f"{op} has no Triton kernel yet, and {reason} never falls back; use auto or torch"
            )
        if obstacle := triton_obstacle(tensor):
            raise RuntimeError(f"{op} cannot run on triton, which is asked for by {source}: {obstacle}")
        return name, reason
    if name == "auto":
        reason += f", a tensor on {tensor.device.type}"
        obstacle = "no kernel" if OPS[op].triton is None else triton_obstacle(tensor, interpreter=False)
        name = "torch" if obstacle else "triton"
    if getattr(OPS[op], name) is None:
        return "reference", f"{reason}; {op} has no closed form yet, so that its reference formula runs"
    return name, reason


def triton_obstacle(tensor: Tensor, interpreter: bool = True) -> str | None:
    """Return why Triton cannot run on `tensor`, or None. The interpreter counts only for an explicit choice."""
    if not tensor.is_cuda and not (interpreter and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensor is on {tensor.device.type}, and it needs a GPU or TRITON_INTERPRET=1"
    if torch.compiler.is_compiling() and forward_mode():
        return "a compiled graph's kernels have no forward mode; compile what is around torch.func.jvp, or use torch"
    return None if has_triton() else "triton is not installed"


def has_triton() -> bool:
    return find_spec("triton") is not None


# torch.compile reads this while it traces. torch.compiler.assume_constant_result sets it, but imports half of torch.
has_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]
