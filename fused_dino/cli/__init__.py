"""The `fused-dino` command: demo, bench and doctor."""

from .main import main

__all__ = ["main"]
