"""Counters that tell the programs of a launch which of them finishes last."""

from collections import defaultdict, deque

import torch
from torch import Tensor

MIN_SLOTS, NEW_SLOTS = 2048, 4096  # more of our launches than MIN_SLOTS are never queued on a GPU at once
_slots: defaultdict[torch.device, deque[Tensor]] = defaultdict(deque)


def ticket(x: Tensor) -> Tensor:
    """Return a zero [] int32 on the device of `x`, for a launch that leaves it zero again.

    Setting a counter to zero would be another launch. Slots are taken in turn, so that launches on different streams do
    not share one. A slot that a CUDA graph captures is not used again outside of the graph.
    """
    if not x.is_cuda:
        return x.new_zeros((), dtype=torch.int32)
    slots, capturing = _slots[x.device], torch.cuda.is_current_stream_capturing()
    if len(slots) < MIN_SLOTS and not capturing:
        slots.extend(x.new_zeros(NEW_SLOTS, dtype=torch.int32).unbind())
        torch.cuda.current_stream(x.device).synchronize()  # once: other streams may use them next
    if not slots:
        return x.new_zeros((), dtype=torch.int32)
    slot = slots.popleft()
    if not capturing:
        slots.append(slot)
    return slot
