"""Count the kernels of eager PyTorch, their FLOP and their bytes, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FREE = ("empty", "_unsafe_view")  # in the names of ops that are no views and launch nothing


class Kernel(NamedTuple):
    """What one launch moves and computes. A multiply-add is two FLOP; arithmetic outside products is not counted."""

    bytes: float
    flops: float


class Recorder(TorchDispatchMode):
    """Records each op as one kernel, which reads its inputs and writes its outputs once. Views are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not any(name in func.name() for name in FREE):
            formula = flop_registry.get(func.overloadpacket)
            flops = formula(*args, **(kwargs or {}), out_val=out) if formula else 0
            self.kernels.append(Kernel(bytes_of(args, kwargs, out), flops))
        return out


class FusedAttention(TorchFunctionMode):
    """Records attention as one kernel, as a GPU runs it, and not as its products."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = args[:3]
        *batch, heads, rows, _ = query.shape
        out = query.new_empty(*batch, rows, heads, value.shape[-1]).transpose(-3, -2)  # as a GPU's kernels lay it out
        products = query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self.recorder.kernels.append(Kernel(bytes_of(args[:3], out), 2 * products))
        return out


def count(call: Callable[[], Any]) -> list[Kernel]:
    """Return the kernels that a call launches, in their order. Its tensors are on the meta device."""
    recorder = Recorder()
    with recorder, FusedAttention(recorder):
        call()
    return recorder.kernels


def bytes_of(*values: Any) -> int:
    """Return the bytes of all tensors in nested values. Expanded elements count once."""
    tensors = {id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}
    return sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in tensors.values())
