"""`fused-dino doctor`: print the installed versions, and the implementation that each op would run."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fused_dino import __version__, explain_backend, registry

OPS = tuple(name for name in registry.OPS if "(" not in name)  # as they are called


def run() -> int:
    for name, value in facts():
        print(f"{name:<24} {value}")
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for op in OPS:
            print(f"{f'{op} on {device}':<24} {explanation(op, device)}")
    return 0


def facts() -> list[tuple[str, str]]:
    return [
        ("fused_dino", __version__),
        ("python", platform.python_version()),
        *((package, installed(package)) for package in ("torch", "triton", "timm", "einops")),
        ("triton interpreted", "yes" if os.environ.get("TRITON_INTERPRET") == "1" else "no"),
        *gpus(),
    ]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("gpu", "none")]
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        (f"gpu {i}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}")
        for i, gpu in enumerate(found)
    ]


def explanation(op: str, device: str) -> str:
    try:
        return explain_backend(op, torch.empty(2, 2, device=device))
    except ValueError as error:  # the environment names a backend that does not exist
        return f"none: {error}"
