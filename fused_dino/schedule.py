"""The schedule of the loss: a weight, a linear warm-up, and a last step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .validation import check_number


class Schedule(nn.Module):
    """The weight of the loss: alpha * min(1, step / warmup_steps) before stop_step, and 0 from it on.

    `step` is an int64 buffer, so that a checkpoint resumes it, a graph capture replays it and torch.compile does not
    compile anew for each value.
    """

    step: Tensor

    def __init__(self, alpha: float, warmup_steps: int, stop_step: int | None = None) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha)
        self.warmup_steps = check_step("warmup_steps", warmup_steps)
        self.stop_step = None if stop_step is None else check_step("stop_step", stop_step)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._counted: tuple[tuple[int, int], int] | None = None

    def advance(self) -> None:
        """Count one step, if the module is in training mode and gradients are enabled."""
        if not self.training or not torch.is_grad_enabled():
            return
        on_host = self.stop_step is not None and not torch.compiler.is_compiling()
        count = self.count() + 1 if on_host else 0
        self.step.add_(1)
        if on_host:
            self._counted = (self._stamp(), count)

    def stopped(self, step: int | None) -> bool:
        """Whether `step`, or the counter where it is None, has reached stop_step. It does not wait for the device.

        Compiled code must not read the counter on the host, or it would be compiled anew in every step. There this is
        False for the counter, and `cut` gives the zero.
        """
        if self.stop_step is None or (step is None and torch.compiler.is_compiling()):
            return False
        return (self.count() if step is None else step) >= self.stop_step

    def factor(self, step: int | None) -> float | Tensor:
        """Return alpha * min(1, step / warmup_steps): a number, or for the counter a float64 scalar on its device."""
        if self.warmup_steps == 0:
            return self.alpha
        if step is not None:
            return self.alpha * min(1.0, step / self.warmup_steps)
        dtype = torch.float32 if self.step.device.type == "mps" else torch.float64  # MPS has no float64
        return self._read().clamp(max=self.warmup_steps).to(dtype) * (self.alpha / self.warmup_steps)

    def cut(self, loss: Tensor, step: int | None) -> Tensor:
        """Return the loss, or from stop_step on an exact zero. The counter is read on its device."""
        if self.stop_step is None or step is not None:
            return loss
        return torch.where(self._read() < self.stop_step, loss, 0)

    def _read(self) -> Tensor:
        """Return the counter through an op that does not change it, and that AOTAutograd does not recompute.

        In the backward AOTAutograd recomputes cheap ops from the buffer, which has advanced by then: in torch 2.14 the
        gradient would have the next step's weight.
        """
        return self.step.cumsum(0)

    def count(self) -> int:
        """Return the counter as an int. It waits for the device only if other code has written the buffer."""
        if self._counted is None or self._counted[0] != self._stamp():
            self._counted = (self._stamp(), int(self.step))
        return self._counted[1]

    def _stamp(self) -> tuple[int, int]:
        return id(self.step), self.step._version

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, warmup_steps={self.warmup_steps}, stop_step={self.stop_step}"


def check_step(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {value!r}")
    return value
