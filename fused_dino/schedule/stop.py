"""What stops a supervision's loss: a step, or the similarity that the student has reached."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import all_reduce, default_group, group_of, shares_buffers
from ..validation import check_choice, check_group, check_int, check_number
from .counter import is_recomputation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("permanent", "recoverable")


@dataclass(frozen=True)
class AtStep:
    """Stops a supervision's loss at a step: from there on it is an exact zero, and the teacher does not run.

    Args:
        step (int): First step without the loss. HASTE stops at 250,000 of 400,000 steps.

    Shape:
        - Loss from ``step`` on: a scalar, with a zero gradient for every parameter and input

    Raises:
        ValueError: If ``step`` is no int of at least 0.

    Example:
        >>> schedule = Schedule(alpha=0.5, warmup_steps=0, stop=AtStep(250_000))
    """

    step: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "step", check_int("step", self.step, 0))


@dataclass(frozen=True)
class BySimilarity:
    r"""Stops a supervision's loss, to an exact zero, once the student's average similarity has reached a threshold.

    .. math:: a_1 = c_1, \quad a_i = d \, a_{i-1} + (1 - d) \, c_i

    c is the mean cosine similarity in a training call, which follows from the loss without its weight, and d is the
    decay. Every ``every`` steps the average of all ranks is compared with ``threshold``. If it is not below, the loss
    stops in that very call. No host waits for its device in between. A similarity that is NaN is left out.

    A permanent stop stays, and the teacher no longer runs. A recoverable stop runs the teacher every ``every`` steps to
    look again. The loss counts again from the call that brings the average below the threshold. Compiled code is made
    before a stop is known: there the teacher always runs, and the zero is exact.

    Args:
        threshold (float): Average similarity that stops the loss.
        decay (float): Factor d of the average, from 0 to below 1. Default: 0.99.
        mode (str): ``"permanent"`` or ``"recoverable"``. Default: ``"permanent"``.
        every (int): Steps from one decision to the next. Default: 100.
        term (str, optional): Name of the term whose similarity counts, which must have a cosine loss. Default: the mean
            over all terms.
        group (ProcessGroup or str, optional): Ranks that decide together, as in VICRegLoss. Default: ``"auto"``.

    Shape:
        - Average: a float64 scalar, in the checkpoint as the bits of ``schedule.watch.average``

    Raises:
        ValueError: If an argument is out of range. The message names it.
        TypeError: If ``group`` is none of these.

    Example:
        >>> schedule = Schedule(alpha=0.5, warmup_steps=0, stop=BySimilarity(0.8, mode="recoverable"))

    Source: the similarity cutoff of SimpleTuner's CREPA, which decides in every step and on each rank alone.
    """

    threshold: float
    decay: float = 0.99
    mode: str = "permanent"
    every: int = 100
    term: str | None = None
    group: ProcessGroup | str | None = "auto"

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {"threshold": check_number("threshold", self.threshold)}
        checked["decay"] = check_number("decay", self.decay, 0)
        checked["every"] = check_int("every", self.every)
        if checked["decay"] >= 1:
            raise ValueError(f"decay must be below 1, got {self.decay!r}")
        check_choice("mode", self.mode, MODES)
        if self.term is not None and not isinstance(self.term, str):
            raise TypeError(f"term must be None or a term's name, got {type(self.term).__name__}")
        check_group(self.group, auto=True)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> BySimilarity:
        """Return itself, which is immutable: a process group cannot be copied."""
        return self


class Watch(nn.Module):
    """The state of a BySimilarity: the average, and whether it has stopped the loss.

    The buffers are int64, which no cast of a model to half precision rounds. `average` holds the bits of a float64, NaN
    before the first value.
    """

    average: Tensor
    stopped: Tensor

    def __init__(self, stop: BySimilarity) -> None:
        super().__init__()
        self.stop = stop
        self.register_buffer("average", torch.full((), math.nan, dtype=torch.float64).view(torch.int64))
        self.register_buffer("stopped", torch.zeros((), dtype=torch.int64))
        self._known: tuple[tuple[int, int], bool] | None = None

    def is_stopped(self) -> bool:
        """Whether the loss has stopped. It waits for the device only after a decision, or a write of other code."""
        if self._known is None or self._known[0] != self._stamp():
            self._known = (self._stamp(), bool(self.stopped))
        return self._known[1]

    def follow(self, similarity: Tensor, due: bool | Tensor) -> None:
        """Take in the similarity of a training call, and decide where that is due.

        due: a bool if the host knows it, else a tensor. Between decisions the averages of the ranks differ; their mean
        is the average of the means. DDP's broadcasts of buffers would replace them by that of one rank.
        """
        stop, known = self.stop, self._known if self._known and self._known[0] == self._stamp() else None
        group = default_group() if stop.group == "auto" else stop.group
        together = due is not False or shares_buffers()
        name = group.group_name if together and group is not None and dist.get_world_size(group) > 1 else None  # type: ignore[union-attr,arg-type]
        flag = due if isinstance(due, Tensor) else torch.full_like(self.stopped, due, dtype=torch.bool)
        value = similarity.detach().to(self.average.device)
        permanent = stop.mode == "permanent"
        follow_similarity(self.average, self.stopped, value, flag, stop.decay, stop.threshold, permanent, name)
        if due is False and known is not None:
            self._known = (self._stamp(), known[1])

    def value(self) -> Tensor:
        """Return a view of the average, a float64 scalar."""
        return self.average.view(torch.float64)

    def _stamp(self) -> tuple[int, int]:
        return id(self.stopped), self.stopped._version


@torch.library.custom_op("fused_dino::follow_similarity", mutates_args=("average", "stopped"))
def follow_similarity(
    average: Tensor,
    stopped: Tensor,
    similarity: Tensor,
    due: Tensor,
    decay: float,
    threshold: float,
    permanent: bool,
    group: str | None,
) -> None:
    """Take a similarity into the average, and decide if that is due. Nothing is read on the host, or done twice."""
    if is_recomputation():
        return
    mean, value = average.view(torch.float64), similarity.double()
    was = stopped != 0
    looks = ~was if permanent else ~was | due  # as eager code does, which skips the teacher otherwise
    fresh = torch.where(mean.isnan(), value, decay * mean + (1 - decay) * value)
    fresh = torch.where(looks & ~value.isnan(), fresh, mean)
    if group is not None:
        total, count = all_reduce(torch.stack([fresh.nan_to_num(0.0), (~fresh.isnan()).double()]), group_of(group))
        fresh = total / count
    mean.copy_(fresh)
    over = fresh >= threshold
    stopped.copy_(torch.where(due, over | was if permanent else over, was))
