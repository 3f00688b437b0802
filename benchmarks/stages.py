"""Run commands one after the other, each within a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .evidence import ROOT, clean
from .smoke import OUT_OF_TIME

GRACE = 5.0  # seconds between asking a stage to end and ending it
ENDS = {0: "passed", OUT_OF_TIME: "out of time"}  # by exit status; others above 0 say that it failed


@dataclass(frozen=True)
class Stage:
    """A command, and its share of the time. Later stages may use what it leaves.

    proves: Whether it decides the exit status.
    missing: Why it has no command and cannot run here.
    """

    name: str
    command: Sequence[str]
    seconds: float
    proves: bool = True
    environment: tuple[tuple[str, str], ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. status: passed, failed, crashed, out of time, interrupted or not found."""

    stage: Stage
    status: str
    seconds: float
    why: str = ""  # it could not start

    @property
    def bad(self) -> bool:
        return self.stage.proves and self.status not in ("passed", "not found")


def run_all(
    stages: Sequence[Stage],
    out: Path,
    seconds: float,
    ended: Callable[[list[Outcome]], object] = lambda outcomes: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run the stages within `seconds` together, and pass the outcomes to `ended` after each. Ctrl-C ends the run."""
    end = clock() + seconds
    scale = min(1.0, seconds / sum(stage.seconds for stage in stages))
    outcomes: list[Outcome] = []
    for i, stage in enumerate(stages):
        later = scale * sum(x.seconds for x in stages[i + 1 :])
        outcomes.append(run_stage(stage, out / f"{stage.name}.log", max(1.0, end - clock() - later)))
        ended(outcomes)
        if outcomes[-1].status == "interrupted":
            break
    return outcomes


def run_stage(stage: Stage, log: Path, limit: float) -> Outcome:
    """Run a stage in a process group of its own. End the whole group when the limit is over."""
    if not stage.command:
        return Outcome(stage, "not found", 0.0, stage.missing)
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
            return Outcome(stage, "crashed", 0.0, clean(error))
        try:
            code = process.wait(timeout=max(1.0, limit - GRACE))
            status = ENDS.get(code, "failed" if code > 0 else "crashed")
        except subprocess.TimeoutExpired:
            status = "out of time"
        except KeyboardInterrupt:
            status = "interrupted"
        finally:
            end(process)
    return Outcome(stage, status, time.monotonic() - start)


def end(process: subprocess.Popen) -> None:
    """Ask the process and its children to end, as Ctrl-C does, then kill those that are left."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(timeout=GRACE)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
