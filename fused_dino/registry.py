"""The ops there are, and what implements each of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .ops import cosine, resize, vicreg, vicreg_ranks
from .reference import cosine as reference_cosine
from .reference import resize as reference_resize
from .reference import vicreg as reference_vicreg


class OpInfo(NamedTuple):
    """What implements an op; None where there is no such implementation.

    reference: the specification, in eager torch.
    torch: its closed form in plain torch.
    triton: its kernels. The latter two of an op by rows take `scale` as well, and return the loss with and without it.
    rowwise: whether it has one loss a row, and takes a weight, a scale and a reduction.
    """

    reference: Callable[..., Any]
    torch: Callable[..., Any] | None = None
    triton: Callable[..., Any] | None = None
    rowwise: bool = False


def both(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The implementations `torch` and `triton` of a function that takes a backend."""
    return partial(function, backend="torch"), partial(function, backend="triton")


OPS: dict[str, OpInfo] = {
    "preprocess": OpInfo(reference_resize.preprocess, *both(resize.preprocess)),
    "cosine_loss": OpInfo(reference_cosine.cosine_loss, *both(cosine.cosine_loss), rowwise=True),
    "mse_loss": OpInfo(reference_cosine.mse_loss, *both(cosine.mse_loss), rowwise=True),
    "vicreg_loss": OpInfo(reference_vicreg.vicreg_loss, *both(vicreg.vicreg_loss)),
    # Over the ranks of a group; on a GPU as on a CPU its products are torch's.
    "vicreg_loss(group)": OpInfo(reference_vicreg.vicreg_loss, vicreg_ranks.vicreg_loss_over_ranks),
}
