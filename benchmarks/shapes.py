"""Every size that is measured, and why."""

from typing import NamedTuple


class Rows(NamedTuple):
    """Inputs [rows, width] of a loss."""

    rows: int
    width: int
    reason: str


ROWS = (
    Rows(256, 1024, "global tokens of one batch: overhead counts, not memory"),
    Rows(16384, 1024, "patch tokens of 64 images of a ViT-L/14 at 224: larger than a CPU's caches"),
)
