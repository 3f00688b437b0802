"""Errors that the user of a command can correct."""

from __future__ import annotations

from pathlib import Path


class CommandError(Exception):
    """An error that is printed as one line on stderr. The command exits with status 2."""


def broken_link() -> str | None:
    """Return an error if a link to a folder was unpacked as a file with a path in it, else None."""
    package = Path(__file__).parent.parent
    files = [name for name in ("kernels", "benchmarks") if not (package / name).is_dir()]
    if not files:
        return None
    return (
        f"{package / files[0]} is no folder: the checkout was unpacked without symbolic links; "
        "clone with `git clone -c core.symlinks=true`, or install the wheel"
    )
