"""The registry of ops and their implementations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .ops import cosine, resize, vicreg, vicreg_ranks
from .reference import cosine as reference_cosine
from .reference import resize as reference_resize
from .reference import vicreg as reference_vicreg


class OpInfo(NamedTuple):
    """The implementations of an op; None for a missing one.

    reference: the specification, in eager torch.
    torch: its closed form in plain torch.
    triton: its kernels.
    rowwise: whether it has one loss per row, and takes a weight, a scale and a reduction. Its `torch` and `triton` then
        take `scale`, and return the loss with it and without.
    """

    reference: Callable[..., Any]
    torch: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    rowwise: bool = False


def both(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the implementations `torch` and `triton` of a function that takes a backend."""
    return partial(function, backend="torch"), partial(function, backend="triton")


OPS: dict[str, OpInfo] = {
    "preprocess": OpInfo(reference_resize.preprocess, *both(resize.preprocess)),
    "cosine_loss": OpInfo(reference_cosine.cosine_loss, *both(cosine.cosine_loss), rowwise=True),
    "mse_loss": OpInfo(reference_cosine.mse_loss, *both(cosine.mse_loss), rowwise=True),
    "vicreg_loss": OpInfo(reference_vicreg.vicreg_loss, *both(vicreg.vicreg_loss)),
    # The rows of all ranks of a group.
    "vicreg_loss(group)": OpInfo(reference_vicreg.vicreg_loss, *both(vicreg_ranks.vicreg_loss_over_ranks)),
}
