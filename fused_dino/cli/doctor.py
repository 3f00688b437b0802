"""`fused-dino doctor`: say what is installed, whether it works, and which implementation each op would run."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple
from urllib.request import Request, urlopen

import torch

from .. import __version__, explain_backend, registry
from ..teacher.weights import TIMEOUT, is_cached
from .checkup import checked

OPS = tuple(name for name in registry.OPS if "(" not in name)  # as they are called
NEEDED = ("torch", "triton", "timm", "einops")
OPTIONAL = ("torchvision",)  # timm imports it
VARIANT = "vitl14"
PLACES = {"hub": "https://dl.fbaipublicfiles.com/dinov2/", "timm": "https://huggingface.co/timm"}


class Finding(NamedTuple):
    """A line of the doctor's, and whether what it names works."""

    name: str
    value: str
    ok: bool = True


def run(json_: bool = False, online: bool = False) -> int:
    findings = list(examine(online))
    ok = all(finding.ok for finding in findings)
    if json_:
        print(json.dumps({"ok": ok, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        for name, value, fine in findings:
            print(f"{name:<24} {value}{'' if fine else '  <- broken'}")
    return 0 if ok else 1


def examine(online: bool) -> Iterator[Finding]:
    yield Finding("fused_dino", __version__)
    yield Finding("python", platform.python_version())
    yield from map(package, NEEDED)
    yield from (found for found in map(package, OPTIONAL) if found.value != "not installed")
    yield Finding("triton interpreted", "yes" if os.environ.get("TRITON_INTERPRET") == "1" else "no")
    yield from gpus()
    yield compiler()
    yield from (weights(source, online) for source in PLACES)
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in OPS:
            yield explanation(op, device)


def package(name: str) -> Finding:
    """Import a package: one that is installed may still be broken by another."""
    try:
        number = version(name)
    except PackageNotFoundError:
        return Finding(name, "not installed", ok=name in OPTIONAL or (name == "triton" and sys.platform != "linux"))
    try:
        import_module(name)
    except Exception as error:
        return Finding(name, f"{number}, cannot be imported: {one_line(error)}", ok=False)
    return Finding(name, number)


def gpus() -> list[Finding]:
    if not torch.cuda.is_available():
        return [Finding("gpu", "none")]
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        Finding(
            f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        )
        for i, gpu in enumerate(found)
    ]


def compiler() -> Finding:
    """Find the C compiler with which Triton builds its launchers, as it does itself."""
    chosen = os.environ.get("CC")
    names = [chosen] if chosen else ["gcc", "clang", "cc"]
    found = next(filter(None, map(shutil.which, names)), None)
    value = found or f"none ({', '.join(names)}): Triton needs one on a GPU; install gcc, or name one in CC"
    return Finding("C compiler", value, ok=found is not None or not torch.cuda.is_available())


def weights(source: str, online: bool) -> Finding:
    name = f"{VARIANT} by {source}"
    if is_cached(source, VARIANT):
        return Finding(name, "in the cache")
    if not online:
        return Finding(name, f"to be downloaded from {PLACES[source]}")
    try:
        with urlopen(Request(PLACES[source], method="HEAD"), timeout=TIMEOUT):
            pass
    except OSError as error:
        if getattr(error, "code", None) is None:  # with one the place has answered
            return Finding(name, f"{PLACES[source]} does not answer: {one_line(error)}", ok=False)
    return Finding(name, f"to be downloaded from {PLACES[source]}, which answers")


def explanation(op: str, device: str) -> Finding:
    name = f"{op} on {device}"
    try:
        reason = explain_backend(op, torch.empty(2, 2, device=device))
    except ValueError as error:  # the environment names a backend that does not exist
        return Finding(name, f"none: {error}", ok=False)
    verdicts = checked(op, device)
    value = "; ".join([reason, *(f"{backend} {verdict}" for backend, verdict in verdicts.items())])
    return Finding(name, value, ok=not reason.startswith("none") and set(verdicts.values()) <= {"agrees"})


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
