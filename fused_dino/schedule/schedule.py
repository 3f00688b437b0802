"""The schedule of a supervision: it counts steps, weighs the loss, and stops it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..validation import check_int
from .counter import count_step, is_recomputation, next_step
from .stop import AtStep, BySimilarity, Watch
from .weight import Weight


class Schedule(nn.Module):
    """When a supervision's loss counts, and how much: a weight by the step, and a stop.

    ``Schedule(alpha, warmup_steps, stop_step)`` is ``Schedule(weight=Weight(alpha, warmup_steps),
    stop=AtStep(stop_step))``. With ``weight`` or ``stop`` the logs also have ``dino_alpha``, the weight in effect, and
    with BySimilarity ``dino_similarity``, its average.

    `step` is an int64 buffer, so that a checkpoint resumes it, a graph capture replays it and torch.compile does not
    compile anew for each value.

    Args:
        alpha (float, optional): Weight after the warm-up. Default: 0.2, unless ``weight`` is given.
        warmup_steps (int, optional): Steps over which the weight rises linearly. Default: 5000, unless ``weight`` is
            given.
        stop_step (int, optional): Step from which the loss is an exact zero. Default: never.
        weight (Weight, optional): The weight by the step, in place of ``alpha`` and ``warmup_steps``.
        stop (AtStep or BySimilarity, optional): What stops the loss, in place of ``stop_step``.
        accumulate (int): Micro-batches, each a call, that count as one step: those of an optimizer's step. A load of a
            checkpoint begins with the first of them. Default: 1.

    Shape:
        - step: an int64 scalar, the steps that were counted

    Raises:
        ValueError: If a number is not finite, a step no int of at least 0, or the same is said twice.
        TypeError: If ``weight`` or ``stop`` is none of these.

    Example:
        >>> Schedule(alpha=0.5, warmup_steps=10).factor(step=5)
        0.25
        >>> schedule = Schedule(weight=Weight(0.5, decay="linear", end_step=100), stop=AtStep(90), accumulate=4)
        >>> schedule.factor(step=50)
        0.25
    """

    step: Tensor
    micro: Tensor | None

    def __init__(
        self,
        alpha: float | None = None,
        warmup_steps: int | None = None,
        stop_step: int | None = None,
        *,
        weight: Weight | None = None,
        stop: AtStep | BySimilarity | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.log_names = () if weight is None and stop is None else ("alpha", "similarity")
        if weight is None:
            weight = Weight(0.2 if alpha is None else alpha, 5000 if warmup_steps is None else warmup_steps)
        elif alpha is not None or warmup_steps is not None:
            raise ValueError("alpha and warmup_steps must be left out where weight is given, which has its own")
        if stop_step is not None:
            if stop is not None:
                raise ValueError("stop_step must be left out where stop is given; AtStep(stop_step) stops at a step")
            stop = AtStep(check_int("stop_step", stop_step, 0))
        if not isinstance(weight, Weight):
            raise TypeError(f"weight must be None or a Weight, got {type(weight).__name__}")
        if stop is not None and not isinstance(stop, AtStep | BySimilarity):
            raise TypeError(f"stop must be None, AtStep or BySimilarity, got {type(stop).__name__}")
        self.weight, self.stop = weight, stop
        self.accumulate = check_int("accumulate", accumulate)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # No buffer: it is in no checkpoint, and loaders give such buffers fresh memory without telling the module.
        self.micro = None if accumulate == 1 else torch.zeros((), dtype=torch.int64, device="cpu")
        self.watch = Watch(stop) if isinstance(stop, BySimilarity) else None
        self._counted: tuple[tuple[int, int], tuple[int, int]] | None = None
        self._skipped = False

    def begin(self, step: int | None) -> int | Tensor:
        """Return the step that a call is: the one that is given, or the counter's, which `advance` counts later."""
        if self.micro is not None and self.micro.device != self.step.device and not self.step.is_meta:
            self.micro = self.micro.to(self.step.device)
        if step is not None:
            return check_int("step", step, 0)
        return next_step(self.step, self.micro) if self._trains() else self.step

    def skips(self, now: int | Tensor) -> bool:
        """Whether the loss of a call is known to be 0 before anything runs. It rarely waits for the device.

        Compiled code must not read buffers on the host, or it would be compiled anew in every step; `settle` gives the
        zero there. A recomputation does what its forward did.
        """
        if isinstance(self.stop, AtStep) and isinstance(now, int | torch.SymInt):
            return now >= self.stop.step
        if self.stop is None or self._is_blind():
            return False
        if isinstance(self.stop, AtStep):
            return self._on_host()[0] >= self.stop.step
        if not is_recomputation():
            again = self.stop.mode == "recoverable" and self._is_due(now)
            self._skipped = self.watch.is_stopped() and not again  # type: ignore[union-attr]
        return self._skipped

    def factor(self, step: int | Tensor) -> Any:
        """Return the weight at a step: a number, or for the counter a float64 scalar on its device."""
        return self.weight(step)

    def settle(self, loss: Tensor, now: int | Tensor, similarity: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a call, or where it has stopped an exact zero, and the logs of the schedule.

        similarity: what BySimilarity follows in a training call.
        """
        over: Tensor | None = None
        if self.watch is not None:
            if similarity is not None and self._trains():
                self.watch.follow(similarity, self._is_due(now))
            over = self.watch.stopped != 0
        elif self.stop is not None and isinstance(now, Tensor):
            over = now >= self.stop.step  # type: ignore[union-attr]
        logs = self.logs(self.factor(now), loss)
        if over is None:
            return loss, logs
        if logs:
            logs["alpha"] = torch.where(over, 0, logs["alpha"])
        return torch.where(over, 0, loss), logs

    def logs(self, alpha: Any, loss: Tensor) -> dict[str, Tensor]:
        """Return what a trainer may plot, in the loss's dtype: the weight in effect, and the average similarity."""
        if not self.log_names:
            return {}
        told = {"alpha": alpha.to(loss) if isinstance(alpha, Tensor) else loss.detach().new_full((), alpha)}
        if self.watch is not None:
            told["similarity"] = self.watch.value().to(loss.device, loss.dtype, copy=True)
        return told

    def advance(self) -> None:
        """Count a call, if the module is in training mode and gradients are enabled."""
        if not self._trains():
            return
        if self.stop is None or self._is_blind():
            count_step(self.step, self.micro, self.accumulate)
            return
        (now, _), (_, micro) = self._on_host(), self._count()
        if not is_recomputation():
            micro = (micro + 1) % self.accumulate
        count_step(self.step, self.micro, self.accumulate)
        self._counted = (self._stamp(), (now, micro))

    def count(self) -> int:
        """Return the counter as an int. It waits for the device only if other code has written the buffer."""
        return self._count()[0]

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _is_blind(self) -> bool:
        """Whether the host must not read buffers: in compiled code, and while a CUDA graph is captured."""
        return torch.compiler.is_compiling() or (self.step.is_cuda and torch.cuda.is_current_stream_capturing())

    def _is_due(self, now: int | Tensor) -> Any:
        """Whether BySimilarity decides in a call: in the first micro-batch of every so many steps. See Watch.follow."""
        every = self.stop.every  # type: ignore[union-attr]
        if not self._is_blind():
            step, first = self._on_host() if isinstance(now, Tensor) else (now, True)
            return self._trains() and first and step % every == 0
        if not isinstance(now, Tensor):
            return torch.full_like(self.step, now) % every == 0
        due = now % every == 0
        return due if self.micro is None else due & (self.micro == 0)

    def _on_host(self) -> tuple[int, bool]:
        """Return the step that a call is, as `begin` does, and whether its first micro-batch is trained in it."""
        step, micro = self._count()
        first = micro == 0 and self._trains() and not is_recomputation()
        return step + first, first

    def _count(self) -> tuple[int, int]:
        if self._counted is None or self._counted[0] != self._stamp():
            self._counted = (self._stamp(), (int(self.step), 0 if self.micro is None else int(self.micro)))
        return self._counted[1]

    def _stamp(self) -> tuple[int, int]:
        return id(self.step), self.step._version

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.micro is not None:
            self.micro.zero_()

    def extra_repr(self) -> str:
        return f"weight={self.weight}, stop={self.stop}" + f", accumulate={self.accumulate}" * (self.accumulate > 1)
