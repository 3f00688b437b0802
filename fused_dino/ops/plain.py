"""The plain route: a shorter path for calls of plain tensors outside of compilers, transforms and modes.

It takes an autograd.Function whose arguments torch does not bind, runs an op without torch's dispatcher, and launches
kernels that were compiled before without Triton's own look-up. Every other call takes the general route. Both make the
same launches, and the same bits.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

LAUNCHES: dict[tuple, Launch] = {}
KEYED = {Tensor, Parameter, int, float, type(None)}
transforms_active = torch._C._are_functorch_transforms_active
dispatch_modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


class Launch(NamedTuple):
    """A compiled kernel, and what its launch takes after the arguments."""

    run: Any
    function: Any
    metadata: Any
    constants: tuple
    owners: tuple  # the kernel and the driver, whose ids are in the key


def forward_mode() -> bool:
    """Whether tensors may have tangents: under torch.func.jvp, and in a dual_level."""
    return forward_ad._current_level >= 0


forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a graph is guarded by the level as it is


def watched() -> bool:
    """Whether a transform, dispatch mode, function mode or forward mode is active."""
    return transforms_active() or dispatch_modes() > 0 or function_modes() > 0 or forward_mode()


def is_plain(args: tuple) -> bool:
    """Whether a call takes the plain route; its first argument is a tensor on the device of all others."""
    if torch.compiler.is_compiling() or watched() or not (args[0].is_cuda or args[0].is_cpu):
        return False
    for x in args:
        kind = type(x)
        if kind is not Tensor and not is_free(kind) and not (isinstance(x, tuple) and is_plain(x)):  # type: ignore[arg-type]
            return False
    return True


@cache
def is_free(kind: Any) -> bool:
    """Whether a value of this type is a parameter, or neither a tensor nor a NamedTuple that holds one."""
    if issubclass(kind, Tensor):
        return kind is Parameter
    return not any("Tensor" in str(field) for field in getattr(kind, "__annotations__", {}).values())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run kernel[grid](*args, **constants), without Triton's own look-up if the kernel was compiled before.

    args: tensors, numbers and None; constants: compile-time constants by name, and the compiler's options.
    """
    active = None if watched() else driver_of(kernel)
    if active is None:
        kernel[grid](*args, **constants)
        return
    device = active.get_current_device()
    key = key_of(kernel, active, device, args, constants)
    found = LAUNCHES.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants)
        if may_cache(args):
            cache_launch(key, kernel, len(args), constants, compiled)
    else:
        run, function, metadata, rest, *_ = found
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, active.get_current_stream(device), function, metadata, None, None, None, *args, *rest)


def driver_of(kernel: Any) -> Any:
    """Return Triton's driver, or None if Triton itself must launch: for a hook, or a global that was changed.

    There is none before the first launch, nor in the interpreter.
    """
    parts = triton()
    runtime = parts.runtime
    if (
        type(kernel) is not parts.JITFunction
        or kernel.pre_run_hooks
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook is not None
    ):
        return None
    for (name, _), (value, scope) in kernel.used_global_vals.items():
        now = scope.get(name)
        if type(now) is not type(value) or getattr(now, "value", now) != getattr(value, "value", value):
            return None  # constants are compared by their values: their own comparison takes microseconds
    return parts.driver._active


def key_of(kernel: Any, active: Any, device: int, args: tuple, constants: dict[str, Any]) -> tuple:
    """Return a key of all that decides a launch's code. Triton makes one code for equal constants, as 1 and 1.0."""
    parts = triton()
    key = [id(kernel), id(active), device, parts.runtime.debug, parts.compilation.instrumentation_mode]
    for x in args:
        kind = type(x)
        if kind is int:
            key.append(class_of(x))
        elif kind is Tensor or kind is Parameter:
            key += x.dtype, x.data_ptr() & 15 == 0
        else:
            key.append(kind)
    return (*key, *constants, *constants.values())


@lru_cache(4096)
def class_of(x: int) -> int:
    """Return the class of an integer that decides the code: whether it is 1 or a multiple of 16, and its width."""
    return -1 if x == 1 else (x & 15 == 0) + (0 if -(2**31) <= x < 2**31 else 2 if x < 2**63 else 4)


def may_cache(args: tuple) -> bool:
    """Whether a launch may be cached: not during graph capture, in inference mode, or for a type that the key lacks."""
    if torch.version.hip or not {*map(type, args)} <= KEYED:  # AMD's code depends on the size of tensors as well
        return False
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not (capturing or torch.is_inference_mode_enabled())


def cache_launch(key: tuple, kernel: Any, arguments: int, constants: dict[str, Any], compiled: Any) -> None:
    rest = [parameter.name for parameter in kernel.params[arguments:]]
    if isinstance(compiled, triton().CompiledKernel) and constants.keys() >= set(rest):
        values = tuple(constants[name] for name in rest)
        owners = kernel, triton().driver._active
        LAUNCHES[key] = Launch(compiled.run, compiled.function, compiled.packed_metadata, values, owners)


@cache
def triton() -> SimpleNamespace:
    """The parts of Triton that a launch reads. The first launch imports it."""
    from triton import knobs
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    return SimpleNamespace(
        runtime=knobs.runtime,
        compilation=knobs.compilation,
        driver=driver,
        JITFunction=JITFunction,
        CompiledKernel=CompiledKernel,
    )
