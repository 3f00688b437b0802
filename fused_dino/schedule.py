"""The schedule of the loss: a weight, a linear warm-up, and a last step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .validation import check_int, check_number


class Schedule(nn.Module):
    """The weight of a supervision's loss: alpha * min(1, step / warmup_steps) before stop_step, and 0 from it on.

    `step` is an int64 buffer, so that a checkpoint resumes it, a graph capture replays it and torch.compile does not
    compile anew for each value.

    Args:
        alpha (float): Weight after the warm-up. Default: 0.2.
        warmup_steps (int): Steps over which the weight rises linearly. Default: 5000.
        stop_step (int, optional): Step from which the loss is an exact zero. Default: never.

    Shape:
        - step: an int64 scalar, the steps that were counted

    Raises:
        ValueError: If a number is not finite, or a step no int of at least 0.

    Example:
        >>> Schedule(alpha=0.5, warmup_steps=10).factor(step=5)
        0.25
    """

    step: Tensor

    def __init__(self, alpha: float = 0.2, warmup_steps: int = 5000, stop_step: int | None = None) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha)
        self.warmup_steps = check_int("warmup_steps", warmup_steps, 0)
        self.stop_step = None if stop_step is None else check_int("stop_step", stop_step, 0)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._counted: tuple[tuple[int, int], int] | None = None

    def advance(self) -> None:
        """Count one step, if the module is in training mode and gradients are enabled."""
        if not self.training or not torch.is_grad_enabled():
            return
        if self.stop_step is None or torch.compiler.is_compiling():
            count_step(self.step)
            return
        count = self.count() if is_recomputation() else self.count() + 1
        count_step(self.step)
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


def is_recomputation() -> bool:
    """Whether a checkpoint of torch.utils runs its forward again, in a backward.

    A reentrant one is the training step itself: its first run has no gradients, as an evaluation has none.
    """
    node = torch._C._current_autograd_node()
    return node is not None and "CheckpointFunction" not in node.name()


@torch.library.custom_op("fused_dino::count_step", mutates_args=("step",))
def count_step(step: Tensor) -> None:
    """Add 1 in a training step. An op, since what a compiler traced once runs in recomputations, too."""
    if not is_recomputation():
        step.add_(1)
