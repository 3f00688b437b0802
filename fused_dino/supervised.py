"""The base class of supervisions, which sums the losses of its terms under a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .legacy_checkpoint import Legacy, adopt, watch_parents
from .live import live_tensors, reach
from .schedule import Schedule
from .teacher.several import Teachers
from .terms.base import Parts
from .validation import check_scalar


class Call(NamedTuple):
    """One call of a term: its arguments, its factor in the sum, and the parts that it uses in place of its own."""

    term: Any
    student: Any  # a tensor, or a list of them
    options: dict[str, Any]
    weight: float
    parts: Parts | None = None
    target: Any = None  # the features that the call gives in place of the teacher's

    def run(self, features: Any, alpha: float | Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss times weight and alpha, and the logs."""
        scale = self.weight if alpha is None else self.weight * alpha
        folded = None if alpha is None and self.weight == 1 else scale
        if self.parts is not None:
            return self.term.align(self.parts, self.student, features, scale=folded, **self.options)
        if "scale" in self.term.takes:
            return self.term(self.student, features, scale=folded, **self.options)
        loss, logs = self.term(self.student, features, **self.options)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = getattr(loss, "shape", type(loss).__name__)
            raise TypeError(f"{type(self.term).__name__} must return a scalar tensor as its loss, got {got}")
        return loss * (scale.to(loss) if isinstance(scale, Tensor) else scale), {"value": loss.detach(), **logs}

    def similarity(self, value: Tensor) -> Tensor:
        """Return the similarity that has the logged loss. It is NaN if all rows are left out."""
        weight, found = self.options.get("weight"), self.term.similarity(value)
        return found if weight is None else torch.where((weight != 0).any(), found, torch.nan)


class Supervised(Teachers):
    """Sums the losses of terms under a schedule, for every kind of supervision."""

    schedule: Schedule
    legacy: Legacy | None = None  # names in others' checkpoints

    def __init__(self) -> None:
        super().__init__()
        watch_parents()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        adopt(self, state_dict, prefix, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _sum(
        self, calls: Mapping[str, Call], x_img: Any, features: Any, alpha: Any, zeros: Sequence[Tensor] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the terms' losses, and their logs by the names of a trainer's log."""
        device, needs = students_of(calls)[0].device, needs_of(calls)
        features = self.features_of(x_img, features, device, needs)
        if alpha is not None:
            alpha = check_scalar("alpha", alpha, self.schedule.step.device)
        losses, logs = list(zeros), {}
        for name, call in calls.items():
            target = features[call.term.teacher] if call.target is None else self.ready(call.target, device)
            loss, found = call.run(target, alpha)
            losses.append(loss)
            if any("loss" in key for key in found):
                raise ValueError(f"logs of {name} must have names without 'loss', which trainers add up: {list(found)}")
            logs.update({self._log_name(name, key): value for key, value in found.items()})
            if "is_global" in found:
                self._warn_once()
        return sum(losses[1:], losses[0]), logs

    def _log_name(self, name: str, key: str) -> str:
        return f"dino_{name}" if key == "value" else f"dino_{name}_{key}"

    def _scheduled(
        self, run: Callable[..., Any], step: int | None, calls: Mapping[str, Call], *inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the result of run(alpha=...) under the schedule, or the zero after its stop, and count a step.

        The step is counted at the end, since a call that raises is no step.
        """
        schedule = self.schedule
        now = schedule.begin(step)
        if schedule.skips(now):
            loss, logs = self._zero(*inputs), {}
            more = schedule.logs(0.0, loss)
        else:
            loss, logs = run(alpha=schedule.factor(now))
            similarity = None if schedule.watch is None else self._similarity(calls, logs, schedule.watch.stop.term)
            loss, more = schedule.settle(loss, now, similarity)
        if step is None:
            schedule.advance()
        return {"loss_dino": loss, **logs, **{f"dino_{key}": value for key, value in more.items()}}

    def _similarity(self, calls: Mapping[str, Call], logs: Mapping[str, Tensor], term: str | None) -> Tensor:
        """Return the similarity of a call's term, or the mean of all, from the logs."""
        if term is not None and term not in calls:
            raise ValueError(f"BySimilarity's term {term!r} must be one of the call's: {', '.join(calls)}")
        names = list(calls) if term is None else [term]
        return torch.stack([calls[name].similarity(logs[self._log_name(name, "value")]) for name in names]).mean()

    def _zero(self, *inputs: Tensor | None, without: str = "") -> Tensor:
        """Return a 0 that gives inputs and parameters a zero gradient. without: a child that is left out."""
        parts = [part for name, part in self.named_children() if name != without]
        tensors = [x for part in parts for x in live_tensors(part) if x.is_floating_point()]
        tensors += [x for x in (*self._parameters.values(), *inputs) if x is not None]
        return reach(*tensors)

    def _check_alpha(self, alpha: Any, as_dict: bool, step: Any) -> None:
        if as_dict and alpha is not None:
            raise ValueError("alpha must be left out with as_dict=True, whose weight is the schedule's")
        if step is not None and not as_dict:
            raise ValueError("step must be left out, or as_dict=True given: only the schedule's weight depends on it")


def students_of(calls: Mapping[str, Call]) -> list[Tensor]:
    """Return the students' tensors, of which a term may have several."""
    students = [call.student for call in calls.values()]
    return [x for student in students for x in ([student] if isinstance(student, Tensor) else student)]


def needs_of(calls: Mapping[str, Call]) -> dict[str | None, frozenset[str]]:
    """Return what is read of each teacher that a call needs."""
    needs: dict[str | None, frozenset[str]] = {}
    for call in calls.values():
        if call.target is None:
            needs[call.term.teacher] = needs.get(call.term.teacher, frozenset()) | call.term.needs
    return needs
