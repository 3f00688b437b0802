"""Measure what is asked for, print it, and keep it: `python -m benchmarks run` and `fused-dino bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from . import evidence, harness, session, table


class Refused(Exception):
    """An error that the user can mend, in one line."""


def bench(
    op: str | None = None,
    row: str | None = None,
    quick: bool = False,
    device: str | None = None,
    seconds: float = float("inf"),
    json: Path | None = None,
    self_check: bool = False,
) -> int:
    """Return the exit status: 0, or 130 when Ctrl-C ended the run. Refuse before anything is measured."""
    benches = harness.benches()
    if op is not None and op not in benches:
        raise Refused(f"--op: {op!r} is not measured; choose from {', '.join(benches)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device: there is no GPU that this torch can use")
    if json is not None:
        try:
            evidence.prepare(json)
        except OSError as error:
            raise Refused(f"--json: cannot write {json}: {error.strerror or error}") from None
    device = device or session.default_device()
    cases = session.plan([benches[op]] if op else benches.values(), device, quick)
    if row is not None and not (cases := [case for case in cases if row in str(case)]):
        raise Refused(f"--row: no row that is to be measured has {row!r} in its name")
    if not cases:
        raise Refused(f"--quick: no row of {op} is in the quick selection; leave --quick out")
    run = session.run(
        cases,
        device=device,
        quick=quick,
        self_check=self_check,
        seconds=seconds,
        path=json,
        starting=lambda case: print(f"measuring {case}", file=sys.stderr, flush=True),
    )
    print(table.report(run, len(cases)))
    if json is not None:
        print(f"Evidence: {json}")
    return 130 if run.ended == "interrupted" else 0
