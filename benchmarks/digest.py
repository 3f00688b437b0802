"""Summarise a run on a GPU on one screen: the stages, failures by name, and a line a row.

`python3 -m benchmarks.digest OUT` summarises the folder of a run that was killed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import evidence, judge, known, smoke, table
from .evidence import Evidence
from .stages import Outcome

HEIGHT, WIDTH = 60, 100
FAILURES = 8  # named at least, however many rows there are
SHORT = {
    " x ": "x", "float32": "f32", "bfloat16": "bf16", "float16": "f16", "uint8": "u8", "size=": "to ",
    "out_dtype=": "as ", "layout=": "", "whiten=True": "whitened", "grad_output=": "times ",
}  # fmt: skip
Line = dict[str, Any]


def write(out: Path, outcomes: Sequence[Outcome]) -> None:
    (out / "summary.txt").write_text(text(out, outcomes) + "\n", encoding="utf-8")


def text(out: Path, outcomes: Sequence[Outcome]) -> str:
    """Return at most HEIGHT lines of WIDTH. Count the lines that do not fit, and name their file."""
    head, *lines = smoke.read(out / "smoke.jsonl") or [{}]
    told = [x for stage in ("tests", "wide") for x in tests(out / f"{stage}.jsonl")]
    runs = list(evidences(out))
    stages = [heading(head, runs, outcomes), *(line(outcome, out) for outcome in outcomes)]
    failures = [f"FAILED {x['test']} - {x['why']}" for x in told if x["outcome"] == "failed"]
    failures += [f"BEGAN  {x['test']}, and did not end" for x in told if x["outcome"] == "began"]
    rows = rows_of(head, lines)
    compared = [said for run in runs for said in comparisons(run)]
    room = HEIGHT - len(stages) - len(notes := known_of(told))
    failures = cut(failures, max(FAILURES, room - len(rows) - len(compared)), "tests.jsonl")
    rows = cut(rows, room - len(failures), "smoke.jsonl")
    compared = cut(compared, room - len(failures) - len(rows), "the evidence")
    return "\n".join(x[:WIDTH].rstrip() for x in [*stages, *failures, *notes, *rows, *compared])


def cut(lines: list[str], most: int, where: str) -> list[str]:
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more, in {where}"][: max(most, 0)]


def heading(head: Line, runs: list[Evidence], outcomes: Sequence[Outcome]) -> str:
    device = head.get("device") or next((run.device["name"] for run in runs), "a device that no stage has told")
    versions = head or next((run.versions for run in runs), {})
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "numpy") if name in versions)
    ended = "FAILED" if any(o.bad for o in outcomes) else "passed" if outcomes else "no stage has ended"
    return f"{device}: {ended}" + (f" ({named})" if named else "")


# --- stages -----------------------------------------------------------------------------------------------------------


def line(outcome: Outcome, out: Path) -> str:
    said = outcome.why or SAYS.get(outcome.stage.name, says_log)(out, outcome.stage.name)
    return f"{outcome.stage.name:<10} {outcome.status:<11} {outcome.seconds:4.0f} s  {said}"[:WIDTH]


def says_smoke(out: Path, name: str) -> str:
    head, *lines = smoke.read(out / "smoke.jsonl") or [{}]
    return smoke.count_of(lines, head["planned"]) if "planned" in head else says_log(out, name)


def says_tests(out: Path, name: str) -> str:
    told = tests(out / f"{name}.jsonl")
    if not told:
        return says_log(out, name)
    counts = {
        what: sum(x["outcome"] == what for x in told) for what in ("passed", "failed", "known", "skipped", "began")
    }
    return ", ".join(f"{count} {'unfinished' if what == 'began' else what}" for what, count in counts.items() if count)


def says_benchmarks(out: Path, name: str) -> str:
    return "; ".join(f"{len(run.records)} rows ({run.ended})" for run in evidences(out)) or says_log(out, name)


def says_log(out: Path, name: str) -> str:
    """Return the line with a memory checker's count, else the last line."""
    lines = [x.strip(" =") for x in log_of(out, name).splitlines() if x.strip(" =")]
    counts = [x for x in lines if re.search(r"ERROR SUMMARY|RACECHECK SUMMARY", x)]
    return (counts or lines or [""])[-1]


SAYS = {"smoke": says_smoke, "tests": says_tests, "wide": says_tests, "benchmarks": says_benchmarks}


def log_of(out: Path, name: str) -> str:
    path = out / f"{name}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def tests(path: Path) -> list[Line]:
    """Return the last line of each test; a test that failed once stays failed."""
    told: dict[str, Line] = {}
    for x in smoke.read(path):
        if told.get(x["test"], {}).get("outcome") not in ("failed", "known"):
            told[x["test"]] = x
    return list(told.values())


def known_of(told: list[Line]) -> list[str]:
    """Name the tests that are known to fail: a line for each reason, and one for those that passed."""
    reasons: dict[str, list[str]] = {}
    for x in told:
        if x["outcome"] == "known":
            reasons.setdefault(x["why"], []).append(x["test"].rpartition("::")[2])
    said = [f"KNOWN  {', '.join(names)}: {why}" for why, names in reasons.items()]
    passed = [x["test"] for x in told if x["outcome"] == "passed" and known.reason(x["test"])]
    return said + [f"KNOWN to fail, and passed: {', '.join(passed)}"] * bool(passed)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(head: Line, lines: list[Line]) -> list[str]:
    """Return a line for each row's last direction and for each wrong one, then the number of rows with a slow host."""
    last: dict[tuple, Line] = {}
    for x in lines:
        key = x["op"], x["row"], x["precision"]
        if key not in last or x["direction"] > last[key]["direction"]:  # "forward + backward" comes after "forward"
            last[key] = x
    shown = [x for x in lines if smoke.bad(x) or x in last.values()]
    if not shown:
        return []
    header = ["op row, times in us", *judge.FIGURES, "predicted", "share", "target", "verdict"]
    said = aligned(header, [cells_of(x, judge.gpu_of(head["device"]), x in last.values()) for x in shown])
    slow = sum(is_slow(x) for x in lines)
    return said + [f"host with > is above eager's, in {slow} of {len(lines)} lines of smoke.jsonl"] * bool(slow)


def aligned(header: list[str], cells: list[list[str]]) -> list[str]:
    """Align all columns but the last."""
    rows = [header, *cells]
    return [f"{line} {row[-1]}" for line, row in zip(table.aligned([row[:-1] for row in rows]), rows, strict=True)]


def cells_of(x: Line, gpu: int | None, telling: bool) -> list[str]:
    us = {name: x.get(f"{name}_us") for name in judge.FIGURES}
    shown = [table.digits(value) if (value := us[name]) is not None else "-" for name in judge.FIGURES]
    shown[-1] += f">{x['eager_host_us']:.0f}" if is_slow(x) else ""
    found = judge.predictions_of(x["op"], x["row"], x["direction"], x["precision"]) if gpu is not None else []
    p, share = found[0] if found else None, x.get("share")
    name = name_of(x["op"], x["row"], x["precision"]) + ("" if telling else f" {x['direction']}")
    if p is None or gpu is None:
        expected, target, verdict = "-", "-", "right"
    else:
        expected = judge.predicted(p, gpu) + ("" if p.figure == "cold" else f" {p.figure}")
        target = ", ".join(judge.alone(p, gpu)) or "-"
        reached = judge.met(p, gpu, us, share, {"host": x.get("eager_host_us")}, {})
        verdict = "right" if reached is None else judge.said(reached)
        share = share if share is None else judge.share_of(p, share)
    verdict = "WRONG" if x["wrong"] else verdict if x.get("repeats", True) else "BITS DIFFER"
    return [name, *shown, expected, "-" if share is None else f"{share:.0%}", target, verdict]


def is_slow(x: Line) -> bool:
    return x.get("host_us", 0) > x.get("eager_host_us", float("inf"))


def name_of(op: str, row: str, precision: str) -> str:
    return short(f"{op.removesuffix('_loss')} {row}") + (" TF32" if precision == "TF32" else "")


def short(row: str) -> str:
    for long, brief in SHORT.items():
        row = row.replace(long, brief)
    return row


# --- benchmarks -------------------------------------------------------------------------------------------------------


def evidences(out: Path) -> list[Evidence]:
    found = []
    for path in sorted(out.glob("*.json")):
        try:
            found.append(evidence.load(path))
        except ValueError:
            continue  # of another program, or cut short
    return found


def comparisons(run: Evidence) -> list[str]:
    """Return a line for each prediction whose row was measured beside its rivals, or else a line for each op."""
    if (found := judge.beside(run)) is not None:
        header = ["reached/target beside rivals", "us", "eager", "compile", "share", "verdict"]
        said = aligned(header, [cells_beside(*line) for line in found.rows])
    else:
        telling = [table.telling(op, run) for op in table.ops(run)]
        said = [f"{record.op} {short(record.row)}: {table.claim(record, run)}" for record in telling]
    return said + ([slow] if (slow := table.slow_hosts(run)) else [])


def cells_beside(op: str, row: str, precision: str, direction: str, figure: str, *cells: str) -> list[str]:
    *_, us, eager, compile, share, verdict = cells
    us += "" if figure == "cold" else f" {figure}"
    return [name_of(op, row, precision), us, eager, compile, share, verdict]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder, [])
    print((folder / "summary.txt").read_text(), end="")
