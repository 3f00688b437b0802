"""Patches that save Triton's interpreter nearly half of its work, and change no result."""

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime import interpreter


def save_work() -> None:
    """Leave out what the interpreter does again and again, or for nobody."""
    replace_the_language_once_a_launch()
    check_no_overflow_in_vain()
    look_dtypes_up_once()


def replace_the_language_once_a_launch() -> None:
    """Replace the builtins of Triton's language by NumPy's once in a launch, which puts them back when it ends.

    Each call of a function in a kernel replaces them once more, name by name, to no effect.
    """
    replace_all = interpreter._patch_lang
    seen: set[int] = set()  # modules, in the launch that is underway
    modules_of: dict[int, tuple[Any, set[int]]] = {}  # by the names that a function sees, which are kept

    def once(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in modules_of:
            modules_of[id(names)] = names, {id(value) for value in names.values() if inspect.ismodule(value)}
        _, modules = modules_of[id(names)]
        if modules <= seen:
            return SimpleNamespace(restore=lambda: None)
        scope = replace_all(function)
        restore = scope.restore

        def end_of_launch() -> None:
            seen.clear()
            restore()

        seen.update(modules)
        scope.restore = end_of_launch
        return scope

    interpreter._patch_lang = once


def check_no_overflow_in_vain() -> None:
    """Compute no sum or product of integers once more in 64 bits: only with `debug` is it looked at."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def look_dtypes_up_once() -> None:
    """Keep NumPy's dtype for each of Triton's, which otherwise makes a table of all for each."""
    find = interpreter._get_np_dtype
    found: dict[str, np.dtype[Any]] = {}

    def look_up(dtype: Any) -> np.dtype[Any]:
        name = dtype.scalar.name
        if name not in found:
            found[name] = find(dtype)
        return found[name]

    interpreter._get_np_dtype = look_up
