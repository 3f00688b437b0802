"""A run: which rows, in which order, and what is recorded of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import evidence, harness, measure, roofs
from .evidence import Evidence, Record, Timing
from .harness import Bench
from .shapes import Row

Sampler = Callable[[], measure.Sample]
SECONDS = {True: 1.0, False: 2.0}  # quick or not: of rounds, beyond the least


@dataclass(frozen=True)
class Case:
    """A row of an op in one direction."""

    bench: Bench
    row: Row
    direction: str

    def __str__(self) -> str:
        return f"{self.bench.op} {self.row} ({self.row.precision}), {self.direction}"


def plan(benches: Iterable[Bench], device: str, quick: bool) -> list[Case]:
    """What a run measures, every op's most telling rows first and whole steps last: it may be ended at any time."""
    cases = [
        Case(bench, row, direction)
        for bench in benches
        for row in bench.rows
        if device in row.on and (row.quick or not quick)
        for direction in bench.directions(row, quick)
    ]
    return sorted(cases, key=lambda case: (not case.row.quick, case.bench.rooms is not None))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run(
    cases: list[Case],
    *,
    device: str,
    quick: bool = False,
    self_check: bool = False,
    seconds: float = float("inf"),
    path: Path | None = None,
    starting: Callable[[Case], Any] = lambda case: None,
    done: Callable[[Record], Any] = lambda record: None,
) -> Evidence:
    """Measures the cases and keeps what was measured: after Ctrl-C and once `seconds` are over, too.

    path: the JSON file, written anew after every case.
    starting, done: told of each case before it is measured, and of its record after.
    """
    start = time.perf_counter()
    run = evidence.begin(device, quick)
    try:
        run.roofs = roofs.measure_roofs(device, {case.row.precision for case in cases})
        for case in cases:
            if time.perf_counter() - start >= seconds:
                run.ended = "out of time"
                break
            starting(case)
            try:
                run.records.append(record(case, device, SECONDS[quick], self_check))
            except Exception as error:
                if not measure.lost():
                    raise
                run.ended = f"the GPU was lost in {case}: {evidence.clean(error)}"
                break
            keep(run, path)
            done(run.records[-1])
        else:
            run.ended = "complete"
    except KeyboardInterrupt:
        run.ended = "interrupted"
    keep(run, path)
    return run


def keep(run: Evidence, path: Path | None) -> None:
    if path is not None:
        evidence.save(run, path)


def record(case: Case, device: str, seconds: float, twice: bool = False) -> Record:
    """Checks everyone who can do a case, and times those that are right in interleaved rounds."""
    bench, row, direction = case.bench, case.row, case.direction
    torch.compiler.reset()  # each row is compiled for its own sizes
    moved, computed = bench.work(row, direction)
    timings: list[Timing] = []
    samplers: dict[str, Sampler] = {}
    with roofs.matrix_precision(row.tf32):
        inputs = harness.draw(bench, row, device)
        for timing, function in checked(case, device, inputs, twice):
            timings.append(timing)
            if function is not None:
                prepare(samplers, timing, partial(sampler, timing, case, function, inputs, device))
        if bench.rooms is not None:
            for name, call in bench.rooms(row, *inputs).items():
                timings.append(Timing(name, "room"))
                make = partial(measure.gpu_sampler, [call]) if device == "cuda" else partial(measure.host_sampler, call)
                prepare(samplers, timings[-1], make)
        rounds = measure.interleave(samplers, seconds)
    for timing in timings:
        timing.rounds = rounds.get(timing.name, [])
    return Record(
        op=bench.op,
        row=str(row),
        shape=list(row.shape),
        dtype=row.dtype,
        precision=row.precision,
        reason=row.reason,
        direction=direction,
        kind=device,
        bytes=moved,
        flops=computed,
        timings=timings,
        quick=row.quick,
    )


def prepare(samplers: dict[str, Sampler], timing: Timing, make: Callable[[], Sampler]) -> None:
    try:
        samplers[timing.name] = make()
    except Exception as error:  # it waits for the GPU, or its copies do not fit
        timing.why = f"could not be timed: {evidence.clean(error)}"


def checked(
    case: Case, device: str, inputs: tuple[Tensor, ...], twice: bool
) -> Iterator[tuple[Timing, harness.Function | None]]:
    """Each provider with what was found of it; no function where it cannot run or is wrong. Eager comes first."""
    bench, row, direction = case.bench, case.row, case.direction
    true = harness.truth(bench, row, inputs, direction)
    eagers: list[float] = []
    for provider in harness.providers(bench, row, device, inputs[0], twice):
        timing = Timing(provider.name, provider.role)
        function = None
        try:
            function = harness.place(provider.make(), device)
            got = harness.bind(bench, row, function, inputs, direction)()
            timing.errors = harness.errors(got, true)
            eagers = eagers or timing.errors
            if wrong := harness.verdict(got, timing.errors, eagers):
                timing.why = f"wrong, not timed: {wrong}"
        except harness.Unavailable as reason:
            timing.why = f"not run: {reason}"
        except Exception as error:  # what a compiler or a peer raises is a finding, and ends no run
            timing.why = f"could not run: {evidence.clean(error)}"
        yield timing, None if timing.why else function


def sampler(timing: Timing, case: Case, function: harness.Function, inputs: tuple[Tensor, ...], device: str) -> Sampler:
    def bind(x: tuple[Tensor, ...]) -> Callable[[], list]:
        return harness.bind(case.bench, case.row, function, x, case.direction)

    if device == "cpu":
        return measure.host_sampler(bind(inputs))
    timing.peak_bytes = measure.peak_bytes(bind(inputs))
    return measure.gpu_sampler([bind(x) for x in measure.rotate(inputs)])
