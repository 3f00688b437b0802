"""Declare how an op is measured, find its implementations on a row, and try them against float64."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_dino import explain_backend

from . import yardstick
from .evidence import Timing, clean
from .shapes import FORWARD, Row

Function = Callable[..., Tensor]
Call = Callable[[], list[Tensor]]
ROUNDINGS = 15  # allowed beside twice eager's error: eager may hit a value exactly, and another order of sums may not


@dataclass(frozen=True, eq=False)
class Bench:
    """An op, and what it takes to measure it. Every callable of a Row may read the row's options.

    The first input gets a gradient.

    op: Its name, as explain_backend knows it.
    rows: Sizes, of shapes.py.
    inputs(row, generator): The inputs of each implementation, on the CPU, random and never zero.
    recipe(row): The eager function of them that a user has today. In float64 it is the truth. Its result is a scalar or
        a tensor. If it is a module, its trainable parameters get a gradient too.
    ours(row, backend): Our function.
    work(row, direction): (bytes, FLOP), the least that must be moved and computed.
    peers: {name: factory(row)}, which returns a function. A peer does exactly the same work.
    exact(row): The truth, if the recipe rounds even in float64.
    parts(row, *inputs): {name: a call without arguments}, parts of the work that are timed beside the whole.
    asks: The op whose backends explain_backend gives, if `op` is no op.
    backends: Whether ours has backends, each of which is timed.
    """

    op: str
    rows: tuple[Row, ...]
    inputs: Callable[[Row, torch.Generator], tuple[Tensor, ...]]
    recipe: Callable[[Row], Function]
    ours: Callable[[Row, str], Function]
    work: Callable[[Row, str], tuple[float, float]]
    peers: Mapping[str, Callable[[Row], Function]] = field(default_factory=dict)
    exact: Callable[[Row], Function] | None = None
    parts: Callable[..., Mapping[str, Callable[[], Any]]] | None = None
    asks: str | None = None
    backends: bool = True

    @property
    def of_a_model(self) -> bool:
        """Tell whether a whole model runs, and not an op alone."""
        return self.parts is not None or not self.backends


def benches() -> dict[str, Bench]:
    """Return every op's declaration: BENCH of each test_*.py beside this file."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    found = (importlib.import_module(f".{stem}", __package__).BENCH for stem in stems)
    return {bench.op: bench for bench in found}


def normal(shape: tuple[int, ...], row: Row, generator: torch.Generator) -> Tensor:
    """Draw from the standard normal distribution, in the row's dtype and layout."""
    layout = row.options.get("layout", "contiguous")
    if layout == "transposed":
        return torch.randn(shape[::-1], generator=generator).to(getattr(torch, row.dtype)).t()
    x = torch.randn(shape, generator=generator).to(getattr(torch, row.dtype))
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def pair(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Draw the student and the teacher of a loss."""
    return normal(row.shape, row, generator), normal(row.shape, row, generator)


@dataclass(frozen=True)
class Case:
    """A row of an op in one direction."""

    bench: Bench
    row: Row
    direction: str

    def __str__(self) -> str:
        return f"{self.bench.op} {self.row} ({self.row.precision}), {self.direction}"

    def draw(self, device: str) -> tuple[Tensor, ...]:
        return tuple(x.to(device) for x in self.bench.inputs(self.row, torch.Generator().manual_seed(0)))

    def bind(self, function: Function, inputs: tuple[Tensor, ...]) -> Call:
        """Return a call without arguments: [value], or [value, gradients of inputs, gradients of parameters]."""
        if self.direction == FORWARD:
            constants = [x.detach() for x in inputs]

            def forward() -> list[Tensor]:
                with torch.no_grad():
                    return [function(*constants)]

            return forward

        leaves = [x.detach().requires_grad_(i == 0) for i, x in enumerate(inputs)]
        needs_grad = leaves[:1]
        if isinstance(function, nn.Module):
            needs_grad += [p for p in function.parameters() if p.requires_grad]
        with torch.no_grad():
            grad_output = grad_output_of(function(*leaves), self.row)

        def forward_and_backward() -> list[Tensor]:
            out = function(*leaves)
            return [out.detach(), *torch.autograd.grad(out, needs_grad, grad_output)]

        return forward_and_backward


def grad_output_of(out: Tensor, row: Row) -> Tensor:
    """Return the row's factor for a scalar. A tensor's elements all differ, so that a misplaced one shows."""
    if out.ndim == 0:
        return torch.full_like(out, row.grad_output)
    return torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape).to(out.dtype)


@dataclass(frozen=True)
class Provider:
    """An implementation. role: eager, again (eager under a second name), compile, ours or peer."""

    name: str
    role: str
    make: Callable[[], Function]


class Unavailable(Exception):
    """The reason why an implementation cannot run here."""


def providers(case: Case, device: str, twice: bool = False) -> Iterator[Provider]:
    """Yield every implementation of the row's work on the device. twice: eager under a second name too."""
    bench, row = case.bench, case.row
    recipe = partial(bench.recipe, row)
    yield Provider("eager", "eager", recipe)
    if twice:
        yield Provider("eager again", "again", recipe)
    yield Provider("torch.compile", "compile", lambda: compiled(recipe()))
    if device == "cuda" and row.quick and bench.parts is None:  # tuning takes a minute a row
        yield Provider("torch.compile, tuned", "compile", lambda: compiled(recipe(), "max-autotune-no-cudagraphs"))
    if not bench.backends:
        yield Provider("fused_dino", "ours", partial(bench.ours, row, "auto"))
    for backend in backends(device) if bench.backends else ():
        yield Provider(f"fused_dino {backend}", "ours", partial(ours, bench, row, backend, device))
    for name, factory in bench.peers.items():
        yield Provider(name, "peer", partial(factory, row))


def backends(device: str) -> tuple[str, ...]:
    return ("triton", "torch") if device == "cuda" else ("torch",)


def compiled(function: Function, mode: str | None = None) -> Function:
    return torch.compile(function, dynamic=False, mode=mode)


def ours(bench: Bench, row: Row, backend: str, device: str) -> Function:
    says = explain_backend(bench.asks or bench.op, torch.empty(0, device=device), backend=backend)  # type: ignore[arg-type]
    if not says.startswith(f"{backend}: "):
        raise Unavailable(says.partition("; ")[2] or says)
    return bench.ours(row, backend)


class Trial:
    """A case on a device: its inputs, and float64's and eager's results, which judge each implementation."""

    def __init__(self, case: Case, device: str) -> None:
        torch.compiler.reset()  # each row is compiled for its own sizes
        self.case, self.device = case, device
        self.inputs = case.draw(device)
        self.true = self.truth()
        self.eager_call = self.bind(case.bench.recipe(case.row))
        self.eager = self.eager_call()

    def truth(self) -> list[Tensor]:
        """Return the result of the call in float64, for the rounded inputs."""
        bench = self.case.bench
        function = (bench.exact or bench.recipe)(self.case.row)
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(self.device).double()
        inputs = tuple(x.double() if x.is_floating_point() else x for x in self.inputs)
        return self.case.bind(function, inputs)()

    def bind(self, function: Function) -> Call:
        if isinstance(function, nn.Module):
            function = function.to(self.device)
        return self.case.bind(function, self.inputs)

    def compare(self, got: list[Tensor]) -> tuple[list[float], str | None]:
        """Return the errors of a value and its gradients in units of the largest true element, and what is wrong."""
        errors, wrong = [], None
        for i, (x, eager, true) in enumerate(zip(got, self.eager, self.true, strict=True)):
            limits = yardstick.finer(x, eager)
            unit = true.abs().max().clamp(min=limits.smallest_normal)
            error = yardstick.compare(x, eager, true, unit, ROUNDINGS * limits.eps)
            errors.append(error.largest)
            if error.too_large and wrong is None:
                wrong = f"{'gradient' if i else 'value'}: {error}"
        return errors, wrong

    def judge(self, provider: Provider) -> tuple[Timing, Function | None]:
        """Try an implementation. One that cannot run or whose error is too large is not returned, and says why."""
        timing = Timing(provider.name, provider.role)
        function = None
        try:
            function = provider.make()
            timing.errors, wrong = self.compare(self.bind(function)())
            if wrong:
                timing.why = f"wrong, not timed: {wrong}"
        except Unavailable as reason:
            timing.why = f"not run: {reason}"
        except Exception as error:  # what a compiler or a peer raises is a finding, and ends no run
            timing.why = f"could not run: {clean(error)}"
        return timing, None if timing.why else function
