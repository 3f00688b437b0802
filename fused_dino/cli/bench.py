"""`fused-dino bench`: time each op against eager PyTorch, torch.compile and its peers on this machine."""

from typing import Any

from ..benchmarks import command
from .errors import CommandError


def run(**options: Any) -> int:
    try:
        return command.bench(**options)
    except command.Refused as refused:
        raise CommandError(str(refused)) from None
