"""The counting of steps, as ops, since a recomputation runs again whatever a compiler has traced."""

from __future__ import annotations

import torch
from torch import Tensor


def is_recomputation() -> bool:
    """Whether a checkpoint of torch.utils runs its forward again, in a backward.

    A reentrant checkpoint counts in the backward: its first run has no gradients, like an evaluation.
    """
    node = torch._C._current_autograd_node()
    return node is not None and "CheckpointFunction" not in node.name()


@torch.library.custom_op("fused_dino::next_step", mutates_args=())
def next_step(step: Tensor, micro: Tensor | None) -> Tensor:
    """Return the step that a call is, before it is counted.

    In the backward AOTAutograd recomputes cheap ops from the buffer, which has advanced by then: in torch 2.14 the
    gradient would have the next step's weight. It does not recompute this one.
    """
    if is_recomputation():
        return step.clone()
    return step + 1 if micro is None else step + (micro == 0)


@next_step.register_fake
def _(step: Tensor, micro: Tensor | None) -> Tensor:
    return torch.empty_like(step)


@torch.library.custom_op("fused_dino::count_step", mutates_args=("step", "micro"))
def count_step(step: Tensor, micro: Tensor | None, accumulate: int) -> None:
    """Count a training call: a step at the first of `accumulate` micro-batches. micro: the micro-batches so far."""
    if is_recomputation():
        return
    if micro is None:
        step.add_(1)
    else:
        step.add_(micro == 0)
        micro.add_(1).remainder_(accumulate)
