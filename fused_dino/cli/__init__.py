"""The `fused-dino` command: `fused-dino demo` and `fused-dino doctor`."""

from .main import main

__all__ = ["main"]
