"""Run the benchmarks: choose the rows, order them, and record each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import evidence, harness, measure, roofs
from .evidence import Evidence, Record, Timing
from .harness import Bench, Case, Trial

Sampler = Callable[[], measure.Sample]
SECONDS = {True: 1.0, False: 2.0}  # quick or not: of rounds, beyond the least


def plan(benches: Iterable[Bench], device: str, quick: bool) -> list[Case]:
    """Return the cases of a run, telling rows first and models after ops, since it may be ended at any time."""
    cases = [
        Case(bench, row, direction)
        for bench in benches
        for row in bench.rows
        if device in row.on and (row.quick or not quick)
        for direction in (row.directions[-1:] if quick else row.directions)
    ]
    return sorted(cases, key=lambda case: (not case.row.quick, case.bench.of_a_model))


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
) -> Evidence:
    """Measure the cases, and keep what was measured even after Ctrl-C or a lost GPU.

    seconds: No case starts after them.
    path: The JSON file, written anew after every case.
    starting: Told of each case before it is measured.
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
    """Judge every implementation of a case, and time those that are right in interleaved rounds."""
    bench, row = case.bench, case.row
    timings: list[Timing] = []
    samplers: dict[str, Sampler] = {}

    def prepare(timing: Timing, make: Callable[[], Sampler]) -> None:
        try:
            samplers[timing.name] = make()
        except Exception as error:  # it waits for the GPU, or its copies do not fit
            timing.why = f"could not be timed: {evidence.clean(error)}"

    with roofs.matrix_precision(row.tf32):
        trial = Trial(case, device)
        for provider in harness.providers(case, device, twice):
            timing, function = trial.judge(provider)
            timings.append(timing)
            if function is not None:
                prepare(timing, partial(sampler, timing, trial, function))
        for name, call in bench.parts(row, *trial.inputs).items() if bench.parts else ():
            timings.append(Timing(name, "part"))
            prepare(timings[-1], partial(measure.sampler, [call], device))
        rounds = measure.interleave(samplers, seconds)
    for timing in timings:
        timing.rounds = rounds.get(timing.name, [])
    moved, computed = bench.work(row, case.direction)
    return Record(
        op=bench.op,
        row=str(row),
        precision=row.precision,
        direction=case.direction,
        kind=device,
        bytes=moved,
        flops=computed,
        timings=timings,
        quick=row.quick,
        images=row.shape[0] if bench.of_a_model else None,
    )


def sampler(timing: Timing, trial: Trial, function: harness.Function) -> Sampler:
    calls = [trial.bind(function)]
    if trial.device == "cuda":
        timing.peak_bytes = measure.peak_bytes(calls[0])
        calls = [trial.case.bind(function, x) for x in measure.rotate(trial.inputs)]
    return measure.sampler(calls, trial.device)
