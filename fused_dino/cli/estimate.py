"""`fused-dino estimate`: say what a supervised step costs on a GPU that you need not have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch

from ..benchmarks import report
from ..benchmarks.evidence import Evidence, Record
from ..benchmarks.shapes import BACKWARD, FORWARD, Row
from ..benchmarks.table import Table, digits, percent, roofs, time
from ..costs import Part, on_meta, step
from ..gpus import GPU, GPUS
from .errors import CommandError
from .teachers import matching

SIDE = 224  # of what the teacher sees


class Line(NamedTuple):
    """A part of the step. seconds: at the roofs. measured: seconds, where a results file has it."""

    part: str
    flops: float
    bytes: float
    launches: int
    seconds: float
    share: float
    measured: float | None


def run(teacher: str, batch: int, gpu: str, side: int, loss: str, dtype: str, json_: bool = False) -> int:
    chosen = find_gpu(gpu)
    name = find_teacher(teacher)
    results = results_of(chosen)
    lines = estimate(name, batch, chosen, side, loss, dtype, [run for _, run in results])
    if json_:
        given = {"teacher": name, "batch": batch, "side": side, "loss": loss, "dtype": dtype}
        files = {stem: run.roofs for stem, run in results}
        document = {**given, "gpu": chosen._asdict(), "parts": [x._asdict() for x in lines], "measured_roofs": files}
        print(json.dumps(document, indent=2))
        return 0
    speeds = f"{chosen.copy / 1e12:g} TB/s, {chosen.matrix[precision_of(dtype)] / 1e12:g} TFLOP/s"
    print(f"Teacher  {name}")
    print(f"Step     {batch} images of {side} x {side}, {dtype}, {loss} loss")
    print(f"GPU      {chosen.name} ({chosen.form}), {speeds}\n")
    print(table(lines, measured=bool(results)).plain())
    print(f"\nAt most {digits(batch / lines[-1].seconds)} images a second. {NOTE}")
    print(f"Roofs: {chosen.source}")
    for stem, found in results:
        print(f"Measured: benchmarks/results/{stem}.json. {roofs(found)}")
    return 0


NOTE = """At the roofs each kernel takes the longer of its
bytes over the memory's speed and its FLOP over the matrix unit's. Teacher and
projector are counted as eager PyTorch launches them, loss and preprocessing as
our kernels. Your model and the optimizer are left out."""


def find_gpu(name: str) -> GPU:
    if name.lower() not in GPUS:
        near = get_close_matches(name.lower(), GPUS, 2) or list(GPUS)
        raise CommandError(f"--gpu: {name!r} is not in the table; near are {', '.join(near)}")
    return GPUS[name.lower()]


def find_teacher(name: str) -> str:
    try:
        found = matching([name])
    except CommandError as error:
        raise CommandError(f"--teacher: {error}") from None
    if len(found) > 1 and any(sign in name for sign in "*?["):
        raise CommandError(f"--teacher: {name!r} names {len(found)}; give one, such as {found[0]}")
    return found[0]


def estimate(
    teacher: str, batch: int, gpu: GPU, side: int, loss: str, dtype: str, results: Sequence[Evidence] = ()
) -> list[Line]:
    """Return a line for each part, and one for the whole step."""
    try:
        model = on_meta(teacher, SIDE)
        parts = step(model, batch, side, loss, getattr(torch, dtype), size=SIDE)
    except Exception as error:  # timm's models refuse in many ways
        raise CommandError(f"--teacher: {teacher} cannot teach at {SIDE}: {' '.join(str(error).split())}") from None
    return at_the_roofs(parts, gpu, dtype, measurements(teacher, batch, side, loss, dtype, model.embed_dim, results))


def at_the_roofs(parts: Sequence[Part], gpu: GPU, dtype: str, measured: dict[str, float]) -> list[Line]:
    roof = gpu.copy, gpu.matrix[precision_of(dtype)]
    times = [part.seconds(*roof) for part in parts]
    whole = sum(times)
    lines = [
        Line(x.name, x.flops, x.bytes, x.launches, seconds, seconds / whole, measured.get(x.name))
        for x, seconds in zip(parts, times, strict=True)
    ]
    flops, moved, launches = (sum(column) for column in list(zip(*lines, strict=True))[1:4])
    return [*lines, Line("step", flops, moved, launches, whole, 1.0, measured.get("step"))]


def precision_of(dtype: str) -> str:
    """Name the precision of matrix products as the benchmarks do."""
    return Row((), "", dtype).precision


def results_of(gpu: GPU) -> list[tuple[str, Evidence]]:
    """Return the results files of a GPU by their stems. An installed package has none."""
    try:
        loaded = report.load()
    except ValueError as error:
        raise CommandError(f"benchmarks/results: {error}") from None
    return [(stem, run) for stem, run in loaded.items() if run.kind == "cuda" and gpu.is_named(run.device["name"])]


def measurements(
    teacher: str, batch: int, side: int, loss: str, dtype: str, width: int, results: Sequence[Evidence]
) -> dict[str, float]:
    """Return the seconds of each part that a results file has at exactly this size: of ours, or of the step's parts."""
    found: dict[str, float] = {}
    rows = {
        "preprocess": ("preprocess", FORWARD, Row((batch, 3, side, side), "", dtype, {"size": SIDE})),
        "teacher": (
            "teacher",
            FORWARD,
            Row((batch, 3, SIDE, SIDE), "", dtype, {"teacher": teacher, "needs": "global"}),
        ),
        "loss": (f"{loss}_loss", BACKWARD, Row((batch, width), "", dtype)),
        "step": ("step", BACKWARD, Row((batch, 3, side, side), "", dtype, {"teacher": teacher})),
    }
    for record in (record for run in results for record in run.records):
        for part, (op, direction, row) in rows.items():
            if (record.op, record.direction, record.row, record.precision) == (op, direction, str(row), row.precision):
                if part != "step":
                    found |= seconds({part: record.of("ours")}, record)
                elif loss == "cosine":
                    inside = {timing.name: timing for timing in record.timings if timing.role == "part"}
                    found = seconds({**inside, "step": record.of("ours")}, record) | found
    return found


def seconds(timings: dict[str, Any], record: Record) -> dict[str, float]:
    times = {name: record.seconds(timing) for name, timing in timings.items()}
    return {name: value for name, value in times.items() if value is not None}


def table(lines: Sequence[Line], measured: bool) -> Table:
    header = ["part", "GFLOP", "GB", "launches", "at the roofs", "share"]
    rows = [
        [x.part, number(x.flops / 1e9), number(x.bytes / 1e9), str(x.launches), time(x.seconds), percent(x.share)]
        for x in lines
    ]
    if measured:
        header.append("measured")
        rows = [[*row, time(x.measured)] for row, x in zip(rows, lines, strict=True)]
    return Table(header, rows)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"
