"""The command: checks what it is asked before anything is measured, measures, prints, and keeps what was measured."""

from __future__ import annotations

from pathlib import Path

from . import evidence, harness, session, show


class Refused(Exception):
    """What the user can mend, in one line."""


def bench(
    op: str | None = None,
    quick: bool = False,
    json: Path | None = None,
    self_check: bool = False,
    seconds: float = float("inf"),
    row: str | None = None,
    device: str | None = None,
) -> int:
    """-> the exit status: 0, or 130 when Ctrl-C ended the run."""
    benches = harness.benches()
    if op is not None and op not in benches:
        raise Refused(f"--op: {op!r} is not measured; choose from {', '.join(benches)}")
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
    with show.progress(len(cases)) as starting:
        run = session.run(
            cases, device=device, quick=quick, self_check=self_check, seconds=seconds, path=json, starting=starting
        )
    print(show.report(run, len(cases)))
    if json is not None:
        print(f"Evidence: {json}")
    return 130 if run.ended == "interrupted" else 0
