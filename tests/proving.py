"""The proving ground: what a test needs to know of an op, and the yardstick for every implementation.

An op joins by a row in table/. test_ops.py runs each row on every implementation; test_kernels.py adds what only device
code can get wrong. With TRITON_INTERPRET=1 the implementation under test is the interpreted kernel, and nothing else.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarks import yardstick
from fused_dino.ops import cosine_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
if INTERPRETED:
    from interpreter import save_work

    save_work()
    IMPLEMENTATIONS: tuple[str, ...] = ("triton",)
    cosine_triton.MANY_ROWS = 64  # a row takes the interpreter some milliseconds
else:
    IMPLEMENTATIONS = ("reference", "torch", "triton") if DEVICE == "cuda" else ("reference", "torch")


def rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Draw standard normal numbers, the same for every dtype and device."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(DEVICE, dtype)


def pair(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    """A student and a teacher."""
    return rows(*shape, **options), rows(*shape, seed=1, **options)


@dataclass(frozen=True)
class Case:
    """A size of an op's inputs, its options, and why it is here.

    closed_form: for an edge that kernels do not have.
    """

    shape: tuple[int, ...]
    reason: str
    options: dict[str, Any] = field(default_factory=dict)
    closed_form: bool = False

    def __str__(self) -> str:
        return "x".join(map(str, self.shape)) + "".join(f"-{k}={v}" for k, v in self.options.items())


@dataclass(frozen=True)
class Op:
    """An op, and what it takes to prove it.

    run(*inputs, backend, **options) -> a tensor.
    scales(*inputs, grad_output, **options) -> the size of the terms whose sums are the value and the gradients. It is
        the unit of errors, which cancellation in the result does not shrink.
    forward, backward: the `overload` of the dispatcher ops, each launched once; None where the op has no kernel.
    forward_arguments(*inputs), backward_arguments(*inputs, *forward's results): what the two take for inputs of
        `shape`, a NamedTuple as its fields.
    inputs: their names; all are of one shape.
    frozen: those of them that get no gradient.
    shape(rows, width): the shape of inputs with this number of examples and this last dimension.
    rowwise: each row of [..., D] has a loss of its own: it takes a reduction and one weight a row.
    more_sizes: more rows and widths at which its kernels must write every element.
    poisoned: whether one NaN or overflow reaches every result. The result may then be NaN or infinite.
    part_of: the public op that it is a step of, if it is not public itself.
    floor: the error that is allowed beside twice eager's, in units of scale * eps: eager may hit a value exactly by
        chance.
    """

    name: str
    run: Callable[..., Tensor]
    cases: tuple[Case, ...]
    scales: Callable[..., tuple[Tensor, ...]]
    forward: Any = None
    backward: Any = None
    forward_arguments: Callable[..., tuple] = lambda *inputs: inputs
    backward_arguments: Callable[..., tuple] = lambda *tensors: tensors
    inputs: tuple[str, ...] = ("student", "target")
    frozen: tuple[str, ...] = ()
    shape: Callable[[int, int], tuple[int, ...]] = lambda rows, width: (rows, width)
    rowwise: bool = False
    more_sizes: tuple[tuple[int, int], ...] = ((1, 1),)
    poisoned: bool = False
    part_of: str = ""
    floor: float = 2.0

    def draw(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs of a shape, on the device under test."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in self.inputs)
        return tuple(x.to(DEVICE, dtype) for x in drawn)

    def weight(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """One weight a row, as an option, where the op takes it."""
        if not self.rowwise:
            return {}
        count = math.prod(shape[:-1])
        return {"weight": torch.linspace(0.25, 2, count + 1, device=DEVICE)[:count].view(shape[:-1])}

    @property
    def reductions(self) -> tuple[dict[str, str], ...]:
        """The options of its default result, and of one value a row where the op has that."""
        return ({}, {"reduction": "none"}) if self.rowwise else ({},)

    @property
    def unreduced(self) -> dict[str, str]:
        """The option under which one row cannot hide behind another."""
        return self.reductions[-1]

    @property
    def differentiated(self) -> tuple[tuple[str, ...], ...]:
        """Yield the inputs that need a gradient: all that may; then, for an op on rows, the first alone.

        Such an op writes the student's gradient in its forward if the target needs none.
        """
        all_of_them = tuple(name for name in self.inputs if name not in self.frozen)
        return (all_of_them, all_of_them[:1]) if self.rowwise else (all_of_them,)


def grad_output_of(out: Tensor) -> Tensor:
    """Return a grad_output that is not 1 and differs from row to row."""
    return torch.linspace(0.5, 1.5, out.numel() + 1, dtype=out.dtype, device=out.device)[1:].view(out.shape)


def results(op: Op, inputs: tuple[Tensor, ...], backend: str, **options: Any) -> list[Tensor]:
    """The op's value and the gradients of its inputs, for each choice of inputs that need one."""
    found = []
    for needs_grad in op.differentiated:
        leaves = {name: x.detach() for name, x in zip(op.inputs, inputs, strict=True)}
        tensors = [leaves[name].requires_grad_() for name in needs_grad]
        out = op.run(*leaves.values(), backend=backend, **options)
        found += [out.detach(), *torch.autograd.grad(out, tensors, grad_output_of(out))]
    return found


def check_accuracy(op: Op, inputs: tuple[Tensor, ...], backend: str, **options: Any) -> None:
    """Hold an error against float64 to twice eager's in the same dtypes, plus the floor, in units of the op's scales.

    The oracle gets the rounded inputs. Where eager is NaN or infinite, so must the result be. A `poisoned` op must be
    NaN or infinite where eager and the oracle both are. Where only eager overflows it may be finite, and must then be
    right. In float64, where eager is the oracle, this holds for the value alone.
    """
    truth = results(op, tuple(x.double() for x in inputs), "reference", **options)
    eager = results(op, inputs, "reference", **options)
    ours = results(op, inputs, backend, **options)
    units = op.scales(*inputs, grad_output_of(truth[0]), **options)
    scales = dict(zip(("value", *op.inputs), units, strict=True))
    names = [name for needs_grad in op.differentiated for name in ("value", *needs_grad)]
    wide = torch.finfo(eager[0].dtype).eps * op.floor
    if eager[0].dtype == torch.float64:
        wide *= 8  # the oracle is eager itself, whose own error is not counted: sums in another order differ by more
    for name, got, plain, true in zip(names, ours, eager, truth, strict=True):
        assert (got.dtype, got.shape) == (plain.dtype, plain.shape), name
        finite = plain.isfinite() & true.isfinite()
        if op.poisoned:
            lost = ~(plain.isfinite() | true.isfinite())
            if name == "value" or got.dtype != torch.float64:
                assert not got[lost].isfinite().any(), f"{name}: finite where eager is not"
            finite |= true.isfinite() & got.isfinite()
        else:
            assert_close(got[~finite], plain[~finite], equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")
        if not finite.any():
            continue
        check_error(name, got[finite], plain[finite], true[finite], scales[name].expand(true.shape)[finite], wide)


def check_error(name: str, got: Tensor, plain: Tensor, true: Tensor, unit: Tensor, floor: float) -> None:
    """Refuse a finite result by the yardstick of the benchmarks: against float64, beside eager's, `plain`."""
    error = yardstick.compare(got, plain, true, unit, floor)
    assert not error.too_large, f"{name}: {error}"
