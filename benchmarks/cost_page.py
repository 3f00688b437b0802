"""Render docs/costs.md: the calculated cost of a step, and measurements from results files."""

from __future__ import annotations

from functools import cache

import torch

from fused_dino import costs, gpus
from fused_dino.gpus import GPU, GPUS

from . import table
from .evidence import Evidence, Record, Timing
from .shapes import Row, read
from .table import Table, digits, percent, time, times

BATCH, SIDE = 256, 256  # images of the predicted step, and their side
NAMED = ("vits14", "vitb14", "vitl14", "vitl14_reg", "vitg14")  # whose kernels are one in all releases of timm
SHARES = "h100"  # whose shares of the parts are predicted

PREAMBLE = """# What it costs

A supervised step adds four parts to yours: the preprocessing of the images, the teacher's forward, the projector, and
the loss. Projector and loss include their backward; your model and the optimizer are left out. `make report` renders
this page, and no figure is typed.

- *Predicted* times are calculated, and are a lower bound. Each kernel takes its bytes over the memory's speed or its
  FLOP over the matrix unit's, whichever is longer, by the data sheet. Teacher and projector are counted as eager
  PyTorch launches them. `fused-dino estimate` predicts any other step.
- *Measured* times come from a file in `benchmarks/results/`, which names its machine. [performance.md](performance.md)
  has every provider and op.
"""


@cache
def parts_of(teacher: str, batch: int, side: int, dtype: str) -> list[costs.Part]:
    """Return the parts of a step by the cosine."""
    return costs.step(costs.on_meta(teacher), batch, side, "cosine", getattr(torch, dtype))


def seconds_of(parts: list[costs.Part], gpu: GPU, precision: str) -> dict[str, float]:
    return {part.name: part.seconds(gpu.copy, gpu.matrix[precision]) for part in parts}


def page(evidences: dict[str, Evidence]) -> str:
    parts = [PREAMBLE, predicted()]
    if not any(run.kind == "cuda" and models(run) for run in evidences.values()):
        parts.append("No GPU has been measured yet.\n")
    return "\n".join(parts + [section(stem, run) for stem, run in evidences.items() if models(run)])


# --- predicted --------------------------------------------------------------------------------------------------------


def predicted() -> str:
    """Return the section of GPUs that need not be here."""
    row = Row((BATCH, 3, SIDE, SIDE), "", "bfloat16")
    heads = [f"{gpu.name}, images/s" for gpu in GPUS.values()]
    speeds = Table(["teacher", "GFLOP an image", *heads], [])
    shares = Table(["teacher", "step", "preprocess", "teacher's share", "projector", "loss"], [])
    for name in NAMED:
        parts = parts_of(name, BATCH, SIDE, row.dtype)
        flops = next(part.flops for part in parts if part.name == "teacher") / BATCH
        steps = [sum(seconds_of(parts, gpu, row.precision).values()) for gpu in GPUS.values()]
        speeds.rows.append([name, digits(flops / 1e9), *(three_digits(BATCH / step) for step in steps)])
        times = seconds_of(parts, GPUS[SHARES], row.precision)
        whole = sum(times.values())
        shares.rows.append([name, time(whole), *(percent(spent / whole) for spent in times.values())])
    step = f"Images a second at most, in a step of {BATCH} images of {SIDE} x {SIDE} in {row.dtype}, with the cosine"
    sources = [f"- {gpu.name} ({gpu.form}): [data sheet]({gpu.source})" for gpu in GPUS.values()]
    return "\n\n".join([
        "## Predicted", f"{step} and a teacher that sees 224 x 224:", speeds.markdown(),
        f"The same step on an {GPUS[SHARES].name}, and the share of each part:", shares.markdown(),
        "The speeds of these GPUs come from:", "\n".join(sources),
    ]) + "\n"  # fmt: skip


def three_digits(value: float) -> str:
    """Print three digits and zeros: the calculation is no finer, and releases of torch and timm differ past them."""
    return f"{float(f'{value:.3g}'):,.0f}"


# --- measured ---------------------------------------------------------------------------------------------------------


def models(run: Evidence) -> list[Record]:
    return [record for record in run.records if record.op in ("teacher", "step")]


def section(stem: str, run: Evidence) -> str:
    """Return the section of a results file on models, with predictions if its GPU is in the table."""
    gpu = gpus.find(run.device["name"]) if run.kind == "cuda" else None
    parts = [f"## Measured: {table.heading(run)}", f"Evidence: `benchmarks/results/{stem}.json`.", *table.remarks(run)]
    for record in models(run):
        parts += [f"### {record.op} {record.row}", forwards(record, run, gpu).markdown()]
        if record.op == "step":
            parts += [
                "The parts of our step. Each is timed alone, so they need not add up to the whole:",
                shares_of(record, gpu).markdown(),
            ]
        parts += [f"- {timing.name}: {timing.why}" for timing in record.timings if timing.why]
    return "\n\n".join(parts) + "\n"


def forwards(record: Record, run: Evidence, gpu: GPU | None) -> Table:
    """Return a line for each provider: images a second, the ratio to eager, and the share of the matrix roof."""
    images = read(record.row).shape[0]
    header = ["provider", "time", "images/s", "vs eager", "of the measured matrix roof"]
    header += ["of the data sheet's"] if gpu else []
    rows = []
    for timing in record.timings:
        if timing.role == "part" or (seconds := record.seconds(timing)) is None:
            continue
        roofs = [run.roofs.get(record.precision), *([gpu.matrix[record.precision]] if gpu else [])]
        shares = ["-" if roof is None else percent(record.flops / seconds / roof) for roof in roofs]
        ratio = times(record.ratio(timing, record.of("eager")))
        rows.append([timing.name, time(seconds), digits(images / seconds), ratio, *shares])
    if gpu:
        bound = bound_of(record, gpu)
        rows.append(["predicted, at the roofs", time(bound), digits(images / bound), "-", "-", "-"])
    return Table(header, rows)


def bound_of(record: Record, gpu: GPU) -> float:
    """Return the predicted seconds of the teacher, or of the whole step."""
    times = predicted_parts(record, gpu)
    return times["teacher"] if record.op == "teacher" else sum(times.values())


def predicted_parts(record: Record, gpu: GPU) -> dict[str, float]:
    row = read(record.row)
    return seconds_of(parts_of(row.options["teacher"], row.shape[0], row.shape[2], row.dtype), gpu, record.precision)


def shares_of(record: Record, gpu: GPU | None) -> Table:
    """Return a line for each part of a step: its time and share, measured and, for a GPU of the table, predicted."""
    whole = record.seconds(record.of("ours"))
    found: dict[str, Timing] = {timing.name: timing for timing in record.timings if timing.role == "part"}
    expected = predicted_parts(record, gpu) if gpu else {}
    header = ["part", "measured", "share", *(["predicted", "predicted share"] if gpu else [])]
    rows = []
    for name, timing in found.items():
        spent = record.seconds(timing)
        line = [name, time(spent), percent(spent / whole) if spent and whole else "-"]
        if gpu:
            line += [time(expected[name]), percent(expected[name] / sum(expected.values()))]
        rows.append(line)
    rows.append(
        ["step", time(whole), "100%" if whole else "-", *([time(sum(expected.values())), "100%"] if gpu else [])]
    )
    return Table(header, rows)
