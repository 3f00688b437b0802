"""The exchanges of a group whose ranks compute one VICReg, each with rows of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .. import distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Ranks(NamedTuple):
    """The ranks of a group, and by rows the number of rows of each, which is known on the host."""

    group: ProcessGroup
    counts: list[int]

    @property
    def own(self) -> slice:
        """The place of this rank's rows among the gathered rows."""
        rank = self.group.rank()
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])

    def start_gather(self, rows: Tensor) -> Callable[[], Tensor]:
        """Begin to gather all rows, and return a function that waits for them."""
        return distributed.start_gather_rows(rows, self.counts, self.group)

    def sum(self, x: Tensor) -> Tensor:
        return distributed.all_reduce(x, self.group)

    def first(self, x: Tensor) -> Tensor:
        """Return the first rank's x []: another machine might choose another one of two similar columns."""
        return distributed.all_gather(x.long().view(1), self.group)[0]

    def start_moments(self, mean: Tensor, rows: int, error: Tensor) -> Callable[[], Moments]:
        """Begin to sum the columns, the errors and the rows of all ranks, and return a function that waits for them.

        mean: of this rank's columns, float64 [D], or [0] where no columns are needed.
        """
        mean = mean if rows else torch.zeros_like(mean)  # of nothing it is NaN
        count = error.new_full((), rows, dtype=torch.float64)
        sums = torch.cat([mean * rows, torch.stack([error.double(), count])])
        pending = distributed.start_all_reduce(sums, self.group)

        def moments() -> Moments:
            total = distributed.wait(pending)
            error, count = total[-2:].unbind()
            return Moments(self, total[:-2] / count.clamp(min=1), mean, rows, count, error)

        return moments


class Moments(NamedTuple):
    """Means of columns in float64: of all ranks' rows, whose number is on the device, and of this rank's."""

    ranks: Ranks
    mean: Tensor  # [D]
    own_mean: Tensor  # [D]
    own_rows: int
    rows: Tensor  # []
    error: Tensor  # [], the sum of the squared errors

    @property
    def away(self) -> Tensor:
        """The difference from this rank's means to the means of all."""
        return self.mean - self.own_mean

    def squares(self, squares: Tensor) -> Tensor:
        """Return the squares of this rank's columns about the means of all, from those about its own."""
        return squares + self.own_rows * self.away.square().to(squares.dtype)

    def sum(self, squares: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what is about the means of all: the product [D, D], with the squares on its diagonal, or these alone."""
        if not squares.numel():
            return squares, product
        if not product.numel():
            return self.ranks.sum(squares), product
        product.diagonal().copy_(squares)
        product = self.ranks.sum(product)
        return product.diagonal().clone(), product
