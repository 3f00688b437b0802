"""Check every row of our kernels against float64, and time it: the first thing that a GPU is asked.

    python3 -m benchmarks.smoke OUT [--seconds 150] [--op NAME] [--device cuda|cpu]

A row takes about a second: nothing is compiled but the kernels, and eager gives its error and its host time alone. The
most telling rows come first. Each becomes a line of OUT/smoke.jsonl as soon as it is measured. A wrong address takes
the GPU from the process: a new one goes on with the next row.

The exit status is 0; 1 where a row is wrong or its bits differ from run to run; OUT_OF_TIME where rows are left.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch

from . import evidence, harness, judge, measure, roofs, session
from .session import Case

OUT_OF_TIME = 75
PROFILED = 5  # calls
Line = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = arguments().parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path, device = options.out / "smoke.jsonl", options.device
    cases = order(chosen(harness.benches().values(), device, options.op))
    if not options.resume:
        found = roofs.measure_roofs(device, {case.row.precision for case in cases}) if device == "cuda" else {}
        described = evidence.describe(device)
        head = {"device": described["name"], "planned": len(cases), "roofs": found, **evidence.versions()}
        path.write_text(json.dumps(head) + "\n")
    head, *lines = read(path)
    done = {(x["op"], x["row"], x["precision"], x["direction"]) for x in lines}
    for case in cases:
        if (case.bench.op, str(case.row), case.row.precision, case.direction) in done:
            continue
        if time.monotonic() - start > options.seconds:
            break
        print(f"{case} ...", flush=True)
        lines.append(row_of(case, device, head["roofs"]))
        with path.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        print(f"  {words(lines[-1])}", flush=True)
        if lines[-1]["wrong"] and device == "cuda" and measure.lost():
            go_on(options, options.seconds - (time.monotonic() - start))
    print(count_of(lines, len(cases)))
    return int(any(map(bad, lines))) or (0 if len(lines) == len(cases) else OUT_OF_TIME)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.smoke", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for smoke.jsonl")
    parser.add_argument("--seconds", type=float, default=150.0, metavar="LIMIT", help="start no row after this long")
    parser.add_argument("--op", metavar="NAME", help="only this one, such as cosine_loss")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that smoke.jsonl does not have")
    return parser


def chosen(benches: Iterable[harness.Bench], device: str, op: str | None = None) -> list[Case]:
    """All rows of the ops that have kernels. A CPU only shows that this runs, and takes the smallest row of each op."""
    plan = [c for c in session.plan(benches, device, quick=False) if c.bench.rooms is None and op in (None, c.bench.op)]
    if device == "cuda":
        return plan
    least = {
        c.bench.op: str(min((x.row for x in plan if x.bench is c.bench), key=lambda r: prod(r.shape))) for c in plan
    }
    return [c for c in plan if str(c.row) == least[c.bench.op]]


def order(cases: list[Case]) -> list[Case]:
    """Put each row's last direction first, and rows with a prediction before others; the ops take turns."""

    def rank(case: Case) -> tuple[bool, bool, bool]:
        known = judge.predictions_of(case.bench.op, str(case.row), case.direction, case.row.precision)
        return case.direction != case.bench.directions(case.row)[-1], not known, not case.row.quick

    turns = {case.bench.op: count() for case in cases}
    ranked = sorted(cases, key=rank)
    at = [next(turns[case.bench.op]) for case in ranked]
    return [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: (rank(ranked[i])[0], at[i]))]


def row_of(case: Case, device: str, found: roofs.Roofs) -> Line:
    """Measure a row. A crash is a finding too."""
    line: Line = {"op": case.bench.op, "row": str(case.row), "precision": case.row.precision,
                  "direction": case.direction, "wrong": None}  # fmt: skip
    try:
        with roofs.matrix_precision(case.row.tf32):
            inspect(case, device, found, line)
    except Exception as error:
        line["wrong"] = f"{type(error).__name__}: {error}"[:500]
    return line


def inspect(case: Case, device: str, found: roofs.Roofs, line: Line) -> None:
    bench, row, direction = case.bench, case.row, case.direction

    def bind(function: harness.Function, inputs: tuple) -> Callable[[], list]:
        return harness.bind(bench, row, function, inputs, direction)

    inputs = harness.draw(bench, row, device)
    true = harness.truth(bench, row, inputs, direction)
    eager = bind(harness.place(bench.recipe(row), device), inputs)
    eagers = harness.errors(eager(), true)
    ours = harness.place(harness.ours(bench, row, "triton" if device == "cuda" else "torch", inputs[0]), device)
    start = time.perf_counter()
    call = bind(ours, inputs)
    got = call()
    if device == "cuda":
        torch.cuda.synchronize()
    line["first_call_s"] = round(time.perf_counter() - start, 2)
    errors = harness.errors(got, true)
    again = call()
    line |= {"errors": errors, "eager_errors": eagers, "wrong": harness.verdict(got, errors, eagers),
             "repeats": all(map(torch.equal, got, again))}  # fmt: skip
    if device == "cpu":
        line["host_us"] = measure.host_sampler(call)()["wall"] * 1e6
        return
    line["host_us"] = (host := measure.enqueue(call)) * 1e6
    line["eager_host_us"] = measure.enqueue(eager) * 1e6
    line["cold_us"] = (seconds := measure.cold(call, host)) * 1e6
    calls = [bind(ours, x) for x in measure.rotate(inputs)]
    graph = measure.capture(calls)
    line["graph_us"] = None if graph is None else measure.replay(graph) / len(calls) * 1e6
    line["share"], line["roof"] = roofs.of_the_roof(seconds, *bench.work(row, direction), row.precision, found)
    line["kernels_us"] = kernels(call)


def kernels(call: Callable[[], Any]) -> dict[str, float] | str:
    """{kernel: microseconds of a call}: where the time of an op of several kernels goes."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(PROFILED):
                call()
            torch.cuda.synchronize()
        spent = {event.key[:60]: event.device_time_total / PROFILED for event in profile.key_averages()}
    except Exception as error:  # whatever a profiler lacks here: the rest of the row stands
        return f"no profiler: {evidence.clean(error)}"
    return {name: round(us, 2) for name, us in spent.items() if us} or "no profiler: it saw no kernel"


def go_on(options: argparse.Namespace, seconds: float) -> None:
    """Put a new process in the place of this one, whose GPU is lost."""
    command = [sys.executable, "-m", "benchmarks.smoke", str(options.out), "--resume", "--seconds", f"{seconds:.0f}"]
    print("  the GPU is lost: a new process goes on", flush=True)
    os.execv(sys.executable, command + (["--op", options.op] if options.op else []))


def read(path: Path) -> list[Line]:
    """Read the lines of a file, such as smoke.jsonl: one for the run, then one a row. A line that a kill cut short is
    left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def bad(line: Line) -> bool:
    return bool(line["wrong"]) or not line.get("repeats", True)


def count_of(lines: list[Line], planned: int) -> str:
    """Say in a line what the rows show."""
    wrong = sum(bool(line["wrong"]) for line in lines)
    differ = sum(not line.get("repeats", True) for line in lines)
    return f"{len(lines)} of {planned} rows, {wrong} wrong, {differ} whose bits differ"


def words(line: Line) -> str:
    us = [f"{name} {line[name + '_us']:.1f} us" for name in judge.FIGURES if line.get(f"{name}_us") is not None]
    share = [f"{line['share']:.0%} of {line['roof']}"] if "share" in line else []
    ends = ["bits differ"] if not line.get("repeats", True) else []
    ends += [f"WRONG: {line['wrong']}"] if line["wrong"] else ["right"]
    return ", ".join([*us, *share, *ends, str(line.get("kernels_us", ""))]).rstrip(", ")


if __name__ == "__main__":
    sys.exit(main())
