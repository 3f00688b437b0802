"""Counters by which the programs of one launch find out which of them is the last."""

from collections import defaultdict, deque

import torch
from torch import Tensor

FEWEST, FRESH = 2048, 4096  # more launches of ours than this never wait on a GPU at once
_slots: defaultdict[torch.device, deque[Tensor]] = defaultdict(deque)


def ticket(x: Tensor) -> Tensor:
    """A zero [] int32 on the device of `x`, for a launch that leaves it zero again.

    Zeroing one for each launch would be a launch more. Slots go round, so that launches on different streams do not
    share one; a slot that a CUDA graph captures is the graph's for good.
    """
    if not x.is_cuda:
        return x.new_zeros((), dtype=torch.int32)
    slots, capturing = _slots[x.device], torch.cuda.is_current_stream_capturing()
    if len(slots) < FEWEST and not capturing:
        slots.extend(x.new_zeros(FRESH, dtype=torch.int32).unbind())
        torch.cuda.current_stream(x.device).synchronize()  # once: other streams may use them next
    if not slots:
        return x.new_zeros((), dtype=torch.int32)
    slot = slots.popleft()
    if not capturing:
        slots.append(slot)
    return slot
