"""Check every row of our kernels against float64, and time it: the first stage on a GPU.

    python3 -m benchmarks.smoke OUT [--seconds 150] [--device cuda|cpu]

A row takes about a second: only the kernels are compiled, and eager only gives its error and its host time. The most
telling rows come first. Each becomes a line of OUT/smoke.jsonl as soon as it is measured. A wrong address takes the GPU
from the process, and a new process goes on with the next row.

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
from .harness import Case, Trial

OUT_OF_TIME = 75
PROFILED = 5  # calls
Line = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = arguments().parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    path, device = options.out / "smoke.jsonl", options.device
    cases = order(chosen(harness.benches().values(), device))
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
            go_on(options.out, options.seconds - (time.monotonic() - start))
    print(count_of(lines, len(cases)))
    return int(any(map(bad, lines))) or (0 if len(lines) == len(cases) else OUT_OF_TIME)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.smoke", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for smoke.jsonl")
    parser.add_argument("--seconds", type=float, default=150.0, metavar="LIMIT", help="start no row after this long")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--resume", action="store_true", help="go on with the rows that smoke.jsonl does not have")
    return parser


def chosen(benches: Iterable[harness.Bench], device: str) -> list[Case]:
    """Return all rows of the ops that have kernels. A dry run on a CPU takes the smallest row of each op."""
    plan = session.plan((bench for bench in benches if not bench.of_a_model), device, quick=False)
    if device == "cuda":
        return plan
    smallest = {c.bench.op: min((x.row for x in plan if x.bench is c.bench), key=lambda r: prod(r.shape)) for c in plan}
    return [case for case in plan if case.row is smallest[case.bench.op]]


def order(cases: list[Case]) -> list[Case]:
    """Put each row's last direction first, and rows with a prediction before others. The ops take turns."""

    def rank(case: Case) -> tuple[bool, bool, bool]:
        known = judge.predictions_of(case.bench.op, str(case.row), case.direction, case.row.precision)
        return case.direction != case.row.directions[-1], not known, not case.row.quick

    turns = {case.bench.op: count() for case in cases}
    turned = [(rank(case)[0], next(turns[case.bench.op]), case) for case in sorted(cases, key=rank)]
    return [case for *_, case in sorted(turned, key=lambda turn: turn[:2])]


def row_of(case: Case, device: str, found: roofs.Roofs) -> Line:
    """Measure a row. A crash is a finding too."""
    line: Line = {"op": case.bench.op, "row": str(case.row), "precision": case.row.precision,
                  "direction": case.direction, "wrong": None}  # fmt: skip
    try:
        with roofs.matrix_precision(case.row.tf32):
            inspect(Trial(case, device), found, line)
    except Exception as error:
        line["wrong"] = f"{type(error).__name__}: {error}"[:500]
    return line


def inspect(trial: Trial, found: roofs.Roofs, line: Line) -> None:
    bench, row, device = trial.case.bench, trial.case.row, trial.device
    ours = harness.ours(bench, row, "triton" if device == "cuda" else "torch", device)
    start = time.perf_counter()
    call = trial.bind(ours)
    got = measure.waiting(call, device)()
    line["first_call_s"] = round(time.perf_counter() - start, 2)
    line["errors"], line["wrong"] = trial.compare(got)
    line["eager_errors"], _ = trial.compare(trial.eager)
    line["repeats"] = all(map(torch.equal, got, call()))
    if device == "cpu":
        line["host_us"] = measure.host_sampler(call)()["wall"] * 1e6
        return
    line["host_us"] = (host := measure.enqueue(call)) * 1e6
    line["eager_host_us"] = measure.enqueue(trial.eager_call) * 1e6
    line["cold_us"] = (seconds := measure.cold(call, host)) * 1e6
    calls = [trial.case.bind(ours, x) for x in measure.rotate(trial.inputs)]
    graph = measure.capture(calls)
    line["graph_us"] = None if graph is None else measure.replay(graph) / len(calls) * 1e6
    work = bench.work(row, trial.case.direction)
    line["share"], line["roof"] = roofs.of_the_roof(seconds, *work, row.precision, found)
    line["kernels_us"] = kernels(call)


def kernels(call: Callable[[], Any]) -> dict[str, float] | str:
    """Return the microseconds of each kernel of a call."""
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


def go_on(out: Path, seconds: float) -> None:
    """Put a new process in the place of this one, whose GPU is lost."""
    command = [sys.executable, "-m", "benchmarks.smoke", str(out), "--resume", "--seconds", f"{seconds:.0f}"]
    print("  the GPU is lost: a new process goes on", flush=True)
    os.execv(sys.executable, command)


def read(path: Path) -> list[Line]:
    """Read a file such as smoke.jsonl: a line for the run, then one a row. Leave out a line that was cut short."""
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
    """Count the rows, those that are wrong, and those that do not repeat."""
    wrong = sum(bool(line["wrong"]) for line in lines)
    differ = sum(not line.get("repeats", True) for line in lines)
    return f"{len(lines)} of {planned} rows, {wrong} wrong, {differ} whose bits differ"


def words(line: Line) -> str:
    us = [f"{name} {line[name + '_us']:.1f} us" for name in judge.FIGURES if line.get(f"{name}_us") is not None]
    share = [f"{line['share']:.0%} of {line['roof']}"] if "share" in line else []
    ends = ["bits differ"] if not line.get("repeats", True) else []
    return ", ".join([*us, *share, *ends, f"WRONG: {line['wrong']}" if line["wrong"] else "right"])


if __name__ == "__main__":
    sys.exit(main())
