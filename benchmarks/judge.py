"""Compare predictions and targets with measurements."""

from __future__ import annotations

from collections.abc import Mapping

from .evidence import Evidence, Record
from .predictions import GPUS, PREDICTIONS, Prediction
from .roofs import of_the_roof
from .table import Table, digits, percent, times

FIGURES = ("cold", "graph", "host")
HEADER = ["op", "row", "precision", "direction", "figure", "limiter", "predicted, us", "measured, us", "vs eager",
          "vs compile", "roof", "met"]  # fmt: skip
Times = Mapping[str, float | None]  # figure -> microseconds


def gpu_of(name: str) -> int | None:
    """Return the predicted GPU whose name a device has."""
    return next((i for i, gpu in enumerate(GPUS) if gpu.is_named(name)), None)


def predictions_of(op: str, row: str, direction: str, precision: str) -> list[Prediction]:
    key = op, row, direction, precision
    return [p for p in PREDICTIONS if (p.op, p.row, p.direction, p.precision) == key]


def share_of(p: Prediction, share: float) -> float:
    """Return the share of the roof by all bytes that the row has to move, in whole percents as it is printed."""
    return round(share * p.traffic, 2)


def met(p: Prediction, gpu: int, ours: Times, share: float | None, eager: Times, compiled: Times) -> bool | None:
    """Return whether the measured figures reach their targets, or None if there are none."""
    mine = ours.get(p.figure)
    checks = []
    if p.share is not None and share is not None:
        checks.append(share_of(p, share) >= p.share[gpu])
    if p.most_us is not None and mine is not None:
        checks.append(mine <= p.most_us)
    for factor, other in ((p.eager, eager.get(p.figure)), (p.compile, compiled.get(p.figure))):
        if factor is not None and mine is not None and other is not None:
            checks.append(other / mine >= factor)
    return all(checks) if checks else None


def said(verdict: bool | None) -> str:
    return "-" if verdict is None else "met" if verdict else "not met"


def at_least(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:g}x"


def alone(p: Prediction, gpu: int) -> list[str]:
    """Return the targets that need no rival."""
    share = [] if p.share is None else [percent(p.share[gpu])]
    return share if p.most_us is None else [*share, f"{p.most_us:g} us"]


def predicted(p: Prediction, gpu: int) -> str:
    return "-" if p.us is None else f"{p.us[gpu]:g}"


# --- tables -----------------------------------------------------------------------------------------------------------


def expected() -> Table:
    """Return every prediction, for both GPUs."""
    header = ["op", "row", "precision", "direction", "figure", *(f"{gpu.name}, us" for gpu in GPUS), "limiter",
              *(f"{gpu.name}, target" for gpu in GPUS), "vs eager", "vs compile"]  # fmt: skip
    both = range(len(GPUS))
    rows = [
        [
            p.op, p.row, p.precision, p.direction, p.figure, *(predicted(p, gpu) for gpu in both), p.limiter,
            *(", ".join(alone(p, gpu)) or "-" for gpu in both), at_least(p.eager), at_least(p.compile),
        ]
        for p in PREDICTIONS
    ]  # fmt: skip
    return Table(header, rows)


def beside(evidence: Evidence) -> Table | None:
    """Return a line for each prediction whose row was measured, as figure/target, or None if there is none."""
    gpu = gpu_of(evidence.device["name"])
    if evidence.kind != "cuda" or gpu is None:
        return None
    rows = []
    for record in evidence.records:
        ours, eager, compiled = (times_of(record, role) for role in ("ours", "eager", "compile"))
        share = share_in(record, evidence)
        for p in predictions_of(record.op, record.row, record.direction, record.precision):
            mine = ours.get(p.figure)
            most = "" if p.most_us is None else f"/{p.most_us:g}"
            shares = [
                "-" if x is None else f"{x:.0%}" for x in (share and share_of(p, share), p.share and p.share[gpu])
            ]
            rows.append([
                p.op, p.row, p.precision, p.direction, p.figure, p.limiter, predicted(p, gpu),
                "-" if mine is None else digits(mine) + most, over(eager.get(p.figure), mine, p.eager),
                over(compiled.get(p.figure), mine, p.compile), "/".join(shares),
                said(met(p, gpu, ours, share, eager, compiled)),
            ])  # fmt: skip
    return Table(HEADER, rows) if rows else None


def over(theirs: float | None, mine: float | None, target: float | None) -> str:
    return f"{times(theirs / mine if theirs and mine else None)}/{at_least(target)}"


def times_of(record: Record, role: str) -> dict[str, float | None]:
    """Return the times of a role's fastest provider, in microseconds."""
    timing = record.of(role)
    if timing is None:
        return {}
    return {name: None if (t := timing.figure(name)) is None else t * 1e6 for name in FIGURES}


def share_in(record: Record, evidence: Evidence) -> float | None:
    seconds = record.seconds(record.of("ours"))
    if seconds is None or "copy" not in evidence.roofs:
        return None
    return of_the_roof(seconds, record.bytes, record.flops, record.precision, evidence.roofs)[0]
