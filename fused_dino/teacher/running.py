"""How a backbone's forward runs: compiled, in slices of the batch, and with tangents."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..validation import check_choice

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes whose results the next call overwrites


class Compiled:
    """Runs a function by torch.compile, which it calls at the first run. A copy and a pickle begin anew.

    mode: of torch.compile.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.compiled: Callable[..., Any] | None = None

    def __reduce__(self) -> Any:
        return Compiled, (self.mode,)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return function(*arguments). One object runs one function."""
        if torch.compiler.is_compiling():  # a compiler around it takes the function as part of its own graph
            return function(*arguments)
        if self.compiled is None:
            self.compiled = torch.compile(of_its_own(function), mode=self.mode)
        out = self.compiled(*arguments)
        return copied(out) if self.mode in CUDA_GRAPHS else out


def check_compile(compile: Any) -> Compiled | None:
    """Return what runs the forward, or None where nothing compiles it."""
    if isinstance(compile, bool):
        return Compiled("default") if compile else None
    return Compiled(check_choice("compile", compile, MODES))


def of_its_own(function: Any) -> Any:
    """Return the same function with a code object of its own: torch counts recompilations by those, up to a limit."""
    code, names = function.__code__.replace(), function.__globals__
    return FunctionType(code, names, function.__name__, function.__defaults__, function.__closure__)


def attention() -> AbstractContextManager[None]:
    """Let attention run by its parts in forward mode: its fused kernels have no tangents."""
    return sdpa_kernel(SDPBackend.MATH) if forward_ad._current_level >= 0 else nullcontext()


def copied(value: Any) -> Any:
    """Return nested dicts with copies of their tensors."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def joined(parts: list[Any]) -> Any:
    """Return the features of a batch for those of its slices: tensors are joined, the rest is that of each slice."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    return torch.cat(parts) if isinstance(first, Tensor) else first
