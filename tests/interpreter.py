"""A patch that saves Triton's interpreter a third of its work.

A launch replaces the builtins of Triton's language by NumPy's, and puts them back when it ends. Each call of a function
in a kernel replaces them once more, name by name, to no effect. The patch leaves that out.
"""

import inspect
from types import SimpleNamespace
from typing import Any

from triton.runtime import interpreter


def replace_the_language_once_a_launch() -> None:
    replace = interpreter._patch_lang
    seen: set[int] = set()  # modules, in the launch that is underway

    def once(function: Any) -> Any:
        modules = {id(value) for value in function.__globals__.values() if inspect.ismodule(value)}
        if modules <= seen:
            return SimpleNamespace(restore=lambda: None)
        scope = replace(function)
        restore = scope.restore

        def end_of_launch() -> None:
            seen.clear()
            restore()

        seen.update(modules)
        scope.restore = end_of_launch
        return scope

    interpreter._patch_lang = once
