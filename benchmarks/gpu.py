"""`make gpu`: the tests, the memory checkers and the benchmarks on a GPU, within a limit, whatever one of them does.

`python3 -m benchmarks.gpu OUT --seconds LIMIT` runs uninstalled. Into the folder OUT go a log for each stage, the
evidence, rewritten after every row, and summary.txt. A stage that fails, crashes or takes too long costs its own share
of the time and no more. The exit status is 0; 1 where a test or a memory checker failed or did not end; 2 where there
is no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import evidence, table
from .evidence import ROOT

HEIGHT, WIDTH = 24, 80  # of the summary: a terminal's
GRACE = 10.0  # seconds between asking a stage to end and ending it


@dataclass(frozen=True)
class Stage:
    """A command, and the share that it may take of the time that is left. A stage that `proves` decides the status."""

    name: str
    command: Sequence[str]
    share: float
    proves: bool = True
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """status: passed, failed, crashed or out of time; said: its last line, or the last that counts tests."""

    stage: Stage
    status: str
    seconds: float
    said: str

    @property
    def bad(self) -> bool:
        return self.stage.proves and self.status != "passed"


def stages(out: Path, device: str) -> list[Stage]:
    python = sys.executable
    found = [Stage("tests", [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], 0.4)]
    if (tool := shutil.which("compute-sanitizer")) is not None:
        for check in ("memcheck", "racecheck"):
            command = [tool, "--tool", check, "--error-exitcode", "9", python, "-m", "benchmarks.exercise"]
            # Each tensor an allocation of its own: torch's allocator hides an access beyond one.
            found.append(Stage(check, command, 0.15, environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)))
    results = str(results_file(out, device))
    measure = [python, "-m", "benchmarks", "run", "--self-check", "--json", results, "--seconds"]
    return [*found, Stage("benchmarks", [*measure, "{seconds}"], 1.0, proves=False)]


def results_file(out: Path, device: str) -> Path:
    return out / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def run_all(
    found: list[Stage], out: Path, seconds: float, clock: Callable[[], float] = time.monotonic
) -> list[Outcome]:
    end = clock() + seconds
    outcomes = []
    for stage in found:
        outcomes.append(run_stage(stage, out / f"{stage.name}.log", max(1.0, stage.share * (end - clock()))))
        print(line(outcomes[-1]), flush=True)
    return outcomes


def run_stage(stage: Stage, log: Path, limit: float) -> Outcome:
    """Runs a stage in a process group of its own, which is ended as a whole when the limit is over."""
    inner = max(1.0, limit - 2 * GRACE)  # for a stage that can end by itself
    command = [part.replace("{seconds}", f"{inner:.0f}") for part in stage.command]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **dict(stage.environment)}
    start = time.monotonic()
    with log.open("wb") as file:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(stage, "crashed", 0.0, evidence.clean(error))
        try:
            code = process.wait(timeout=limit)
            status = "passed" if code == 0 else "failed" if code > 0 else "crashed"
        except subprocess.TimeoutExpired:
            end(process)
            status = "out of time"
        except BaseException:  # Ctrl-C ends the stage, too
            end(process)
            raise
    return Outcome(stage, status, time.monotonic() - start, last_words(log))


def end(process: subprocess.Popen) -> None:
    """Asks the process and its children to end, as Ctrl-C does, then ends them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def last_words(log: Path) -> str:
    lines = [line.strip(" =") for line in log.read_text(errors="replace").splitlines() if line.strip(" =")]
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error)|ERROR SUMMARY|RACECHECK SUMMARY", line)]
    return (counts or lines or [""])[-1]


def line(outcome: Outcome) -> str:
    return f"{outcome.stage.name:<11} {outcome.status:<11} {outcome.seconds:5.0f} s  {outcome.said}"[:WIDTH]


def failures(out: Path) -> list[str]:
    log = out / "tests.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    return re.findall(r"^(?:FAILED|ERROR) \S.*", text, re.MULTILINE)


def summary(outcomes: list[Outcome], out: Path, device: str) -> str:
    """What fits a screen: the stages, the first failures, and a line or two of each op."""
    lines = [f"{device}: {'FAILED' if any(o.bad for o in outcomes) else 'passed'}", *map(line, outcomes)]
    said = claims(results_file(out, device))
    failed = failures(out)
    room = HEIGHT - len(lines) - len(said) - 2
    if len(failed) > room:
        failed = [*failed[: max(0, room - 1)], f"... and {len(failed) - max(0, room - 1)} more, in tests.log"]
    return "\n".join(text[:WIDTH] for text in [*lines, *failed, *said][: HEIGHT - 1])


def claims(path: Path) -> list[str]:
    if not path.exists():
        return ["no row was measured"]
    try:
        run = evidence.load(path)
    except ValueError as error:
        return [str(error)]
    said = [f"{len(run.records)} rows measured ({run.ended}), in {path.name}"]
    for op in dict.fromkeys(record.op for record in run.records):
        record = table.telling(op, run)
        said += [f"{op}: {record.row}", f"  {table.claim(record, run)}"]
    return said


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for logs, evidence and summary.txt")
    parser.add_argument("--seconds", type=float, default=1800.0, metavar="LIMIT", help="for everything; default: 1800")
    options = parser.parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print(f"{parser.prog}: there is no GPU that this torch can use", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    out, device = options.out.resolve(), torch.cuda.get_device_name()
    outcomes = run_all(stages(out, device), out, options.seconds)
    said = summary(outcomes, out, device)
    (out / "summary.txt").write_text(said + "\n", encoding="utf-8")
    print(said)
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
