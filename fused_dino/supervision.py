"""A supervision: a teacher, its terms and a schedule. It answers as a trainer wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import warn_if_unsynchronised
from .legacy_checkpoint import Legacy, adopt, watch_parents
from .live import live_tensors, reach
from .schedule import Schedule
from .teacher.held import Taught
from .terms.base import Parts, Term
from .validation import check_int, check_scalar


class Call(NamedTuple):
    """A term, what it gets in one call, its factor in the sum, and the parts that it uses in place of its own."""

    term: Any
    student: Tensor
    options: dict[str, Any]
    weight: float
    parts: Parts | None = None

    def run(self, features: Any, alpha: float | Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss times weight and alpha, and the logs."""
        scale = self.weight if alpha is None else self.weight * alpha
        folded = None if alpha is None and self.weight == 1 else scale
        if self.parts is not None:
            return self.term.align(self.parts, self.student, features, scale=folded, **self.options)  # type: ignore
        if "scale" in self.term.takes:
            return self.term(self.student, features, scale=folded, **self.options)  # type: ignore[no-any-return]
        loss, logs = self.term(self.student, features, **self.options)
        if not isinstance(loss, Tensor) or loss.ndim:
            got = getattr(loss, "shape", type(loss).__name__)
            raise TypeError(f"{type(self.term).__name__} must return a scalar tensor as its loss, got {got}")
        return loss * (scale.to(loss) if isinstance(scale, Tensor) else scale), {"value": loss.detach(), **logs}


class Supervised(Taught):
    """What every supervision does with the calls of its terms."""

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
        needs = frozenset().union(*(call.term.needs for call in calls.values()))
        features = self._features(x_img, features, next(iter(calls.values())).student.device, needs)
        if alpha is not None:
            alpha = check_scalar("alpha", alpha, self.schedule.step.device)
        losses, logs = list(zeros), {}
        for name, call in calls.items():
            loss, found = call.run(features, alpha)
            losses.append(loss)
            logs.update({self._log_name(name, key): value for key, value in found.items()})
            if "is_global" in found:
                self._warn_once()
        return sum(losses[1:], losses[0]), logs

    def _log_name(self, name: str, key: str) -> str:
        return f"dino_{name}" if key == "value" else f"dino_{name}_{key}"

    def _scheduled(self, run: Callable[..., Any], step: int | None, *inputs: Tensor | None) -> dict[str, Tensor]:
        """Count a step, and return what run(alpha=...) gives under the schedule's weight, or the zero after its stop."""
        if step is None:
            self.schedule.advance()
        else:
            step = check_int("step", step, 0)
        if self.schedule.stopped(step):
            return {"loss_dino": self._zero(*inputs)}
        loss, logs = run(alpha=self.schedule.factor(step))
        return {"loss_dino": self.schedule.cut(loss, step), **logs}

    def _zero(self, *inputs: Tensor | None, without: str = "") -> Tensor:
        """Return 0 that gives inputs and parameters a zero gradient. without: a child that is left out."""
        parts = [part for name, part in self.named_children() if name != without]
        tensors = [x for part in parts for x in live_tensors(part) if x.is_floating_point()]
        tensors += [x for x in (*self._parameters.values(), *inputs) if x is not None]
        return reach(*tensors)

    def _check_alpha(self, alpha: Any, as_dict: bool, step: Any) -> None:
        if as_dict and alpha is not None:
            raise ValueError("alpha must be left out with as_dict=True, whose weight is the schedule's")
        if step is not None and not as_dict:
            raise ValueError("step must be left out, or as_dict=True given: only the schedule's weight depends on it")


def share_out(terms: Mapping[str, Term], **options: Any) -> dict[str, dict[str, Any]]:
    """Return the options of a call by term. One that is a dict names its terms; else it goes to all that take it."""
    shares: dict[str, dict[str, Any]] = {name: {} for name in terms}
    for option, value in options.items():
        takers = [name for name, term in terms.items() if option in term.takes]
        if value is None:
            continue
        if not takers:
            raise ValueError(f"{option} must be left out: none of the terms {', '.join(terms)} takes it")
        if not isinstance(value, Mapping):
            if option == "index" and len(takers) > 1:
                raise ValueError(f"index must be a dict by term, since several take one: {', '.join(takers)}")
            value = dict.fromkeys(takers, value)
        for name, its in value.items():
            if name not in takers:
                raise ValueError(f"{option} is given to {name!r}; the terms that take it are {', '.join(takers)}")
            if its is not None:
                shares[name][option] = its
    return shares
