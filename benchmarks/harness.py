"""What an op declares to be measured, the providers that this makes, and the check that disqualifies a wrong one."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_dino import explain_backend

from .shapes import FORWARD, Row

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Bench:
    """An op, and what it takes to measure it; every callable of a Row is free to read the row's options.

    op: its name, as explain_backend knows it.
    rows: of shapes.py.
    inputs(row, generator) -> the tensors that each provider is called with, on the CPU, random and never zero.
    recipe(row) -> the eager function of them that a user has today; also run on float64, where it is the truth. A
        scalar, or a tensor. A function may be a module: its trainable parameters get their gradient, too.
    ours(row, backend) -> our function.
    work(row, direction) -> (bytes, FLOP), the least that must be moved and computed.
    peers: {name: factory(row) -> their function, or None for a row that they cannot do}; None in the factory's place
        says that the package is not installed. Only what does exactly the same work is a peer.
    gradient: which inputs get a gradient; none: the op is measured forward only.
    exact(row): the truth, where the recipe rounds even in float64.
    rooms(row, *inputs) -> {name: a call without arguments}: parts of the work, timed beside the whole.
    asks: the op whose backends explain_backend is asked for, where `op` is no op.
    """

    op: str
    rows: tuple[Row, ...]
    inputs: Callable[[Row, torch.Generator], tuple[Tensor, ...]]
    recipe: Callable[[Row], Function]
    ours: Callable[[Row, str], Function]
    work: Callable[[Row, str], tuple[float, float]]
    peers: Mapping[str, Callable[[Row], Function | None] | None] = field(default_factory=dict)
    gradient: tuple[int, ...] = (0,)
    exact: Callable[[Row], Function] | None = None
    rooms: Callable[..., Mapping[str, Callable[[], Any]]] | None = None
    asks: str | None = None

    def directions(self, row: Row, quick: bool = False) -> tuple[str, ...]:
        """What is measured of a row; a quick run takes the last."""
        possible = row.directions if self.gradient else (FORWARD,)
        return possible[-1:] if quick else possible


@dataclass(frozen=True)
class Provider:
    """A way to do the work. role: eager, again (eager under a second name), compile, ours or peer."""

    name: str
    role: str
    make: Callable[[], Function]


class Unavailable(Exception):
    """Why a provider cannot run here."""


def benches() -> dict[str, Bench]:
    """Every op's declaration: BENCH of each test_*.py beside this file."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    found = (importlib.import_module(f".{stem}", __package__).BENCH for stem in stems)
    return {bench.op: bench for bench in found}


def normal(shape: tuple[int, ...], row: Row, generator: torch.Generator) -> Tensor:
    """Standard normal in the row's dtype and layout."""
    layout = row.options.get("layout", "contiguous")
    if layout == "transposed":
        return torch.randn(shape[::-1], generator=generator).to(getattr(torch, row.dtype)).t()
    x = torch.randn(shape, generator=generator).to(getattr(torch, row.dtype))
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def pair(row: Row, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Student and teacher of a loss."""
    return normal(row.shape, row, generator), normal(row.shape, row, generator)


def providers(bench: Bench, row: Row, device: str, like: Tensor, twice: bool = False) -> Iterator[Provider]:
    """Whoever does the row's work on the device. like: its first input; twice: eager also under a second name."""
    yield Provider("eager", "eager", lambda: bench.recipe(row))
    if twice:
        yield Provider("eager again", "again", lambda: bench.recipe(row))
    yield Provider("torch.compile", "compile", lambda: compiled(bench.recipe(row)))
    if device == "cuda" and row.quick:  # tuning takes a minute a row
        mode = "max-autotune-no-cudagraphs"
        yield Provider("torch.compile, tuned", "compile", lambda: compiled(bench.recipe(row), mode))
    for backend in ("triton", "torch") if device == "cuda" else ("torch",):
        yield Provider(f"fused_dino {backend}", "ours", lambda b=backend: ours(bench, row, b, like))  # type: ignore[misc]
    for name, factory in bench.peers.items():
        if factory is None or (function := factory(row)) is not None:
            yield Provider(name, "peer", missing if factory is None else lambda f=function: f)  # type: ignore[misc]


def compiled(function: Function, mode: str | None = None) -> Function:
    return torch.compile(function, dynamic=False, mode=mode)


def ours(bench: Bench, row: Row, backend: str, like: Tensor) -> Function:
    says = explain_backend(bench.asks or bench.op, like, backend=backend)  # type: ignore[arg-type]
    if not says.startswith(f"{backend}: "):
        raise Unavailable(says.partition("; ")[2] or says)
    return bench.ours(row, backend)


def missing() -> Function:
    raise Unavailable("not installed")


def draw(bench: Bench, row: Row, device: str) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in bench.inputs(row, torch.Generator().manual_seed(0)))


def place(function: Function, device: str) -> Function:
    return function.to(device) if isinstance(function, nn.Module) else function


def bind(bench: Bench, row: Row, function: Function, inputs: tuple[Tensor, ...], direction: str) -> Callable[[], list]:
    """A call without arguments: [value], or [value, gradients of inputs, gradients of parameters]."""
    if direction == FORWARD:
        constants = [x.detach() for x in inputs]

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function(*constants)]

        return forward

    leaves = [x.detach().requires_grad_(i in bench.gradient) for i, x in enumerate(inputs)]
    wanted = [leaves[i] for i in bench.gradient]
    if isinstance(function, nn.Module):
        wanted += [p for p in function.parameters() if p.requires_grad]
    with torch.no_grad():
        grad_output = grad_output_of(function(*leaves), row)

    def forward_and_backward() -> list[Tensor]:
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, wanted, grad_output)]

    return forward_and_backward


def grad_output_of(out: Tensor, row: Row) -> Tensor:
    """A scalar's from the row; of a tensor every element's differs, so that a misplaced one shows."""
    if out.ndim == 0:
        return torch.full_like(out, row.grad_output)
    return torch.linspace(0.5, 1.5, out.numel(), device=out.device).view(out.shape).to(out.dtype)


def truth(bench: Bench, row: Row, inputs: tuple[Tensor, ...], direction: str) -> list[Tensor]:
    """What the call returns in float64, of the inputs as they were rounded."""
    function = (bench.exact or bench.recipe)(row)
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).to(inputs[0].device).double()
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return bind(bench, row, function, wide, direction)()


def errors(got: list[Tensor], true: list[Tensor]) -> list[float]:
    """Of the value and of each gradient: the largest error over the largest true element; infinite if misshapen."""
    if len(got) != len(true):
        return [math.inf] * len(true)
    return [error(g, t) for g, t in zip(got, true, strict=True)]


def error(got: Tensor, true: Tensor) -> float:
    if got.shape != true.shape:
        return math.inf
    return ((got.double() - true).abs().max() / true.abs().max().clamp(min=1e-300)).item()


ROUNDINGS = 16  # beside twice eager's error: eager may hit a value exactly, and sums in another order differ by some


def verdict(got: list[Tensor], mine: list[float], eagers: list[float]) -> str | None:
    """Why a provider is disqualified, or None: tests/proving.py's rule, at most twice eager's error plus a floor."""
    for name, value, mine_, eagers_ in zip(["value", *["gradient"] * len(got)], got, mine, eagers, strict=False):
        allowed = 2 * eagers_ + ROUNDINGS * torch.finfo(value.dtype).eps
        if not mine_ <= allowed:  # NaN is wrong too
            return f"its {name} is off by {mine_:.1e}, allowed {allowed:.1e}"
    return None
