"""A picture of a run: for each row, how many times faster than eager each provider is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import table
from .evidence import Evidence, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"compile": "#9aa5b1", "ours": "#1769aa", "peer": "#c98a1b"}


def save(evidence: Evidence, path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "fused_dino", "font.size": 9}):  # the same file from the same evidence
        draw(evidence).savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def draw(evidence: Evidence) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    records = [r for r in table.last_directions(evidence.records) if r.of("eager")]
    bars = [(r, t) for r in records for t in r.timings if t.role in COLOURS and t.rounds]
    figure = Figure(figsize=(8, 1.3 + 0.22 * len(bars) + 0.5 * len(records)), layout="constrained")
    axes = figure.subplots()
    heights, y, labels = [], 0.0, []
    for record in records:
        title = f"{record.op}  {record.row} ({record.precision}), {record.direction}"
        axes.text(0, y, title, va="bottom", weight="bold",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
                  transform=axes.get_yaxis_transform())  # fmt: skip
        for timing in (t for r, t in bars if r is record):
            y += 1
            ratio = record.ratio(timing, record.of("eager")) or 0.0
            low, high = whiskers(record, timing.name)
            axes.barh(y, ratio - 1, left=1, height=0.8, color=COLOURS[timing.role])
            axes.plot([low, high], [y, y], color="#222222", linewidth=1)
            axes.text(max(high, 1), y, f"  {table.times(ratio)}", va="center")
            heights.append(y)
            labels.append(timing.name)
        y += 2.2
    axes.set_yticks(heights, labels)
    axes.axvline(1, color="#222222", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(y - 1.2, -1.2)
    axes.set_xlim(axes.get_xlim()[0] / 1.2, axes.get_xlim()[1] * 1.5)
    axes.set_xlabel("speed over eager's, slower to the left; lines span the quartiles of the rounds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(table.heading(evidence), fontsize=9, x=0.01, ha="left")
    return figure


def whiskers(record: Record, name: str) -> tuple[float, float]:
    """Eager's median over the quartiles of a provider's rounds."""
    from statistics import quantiles

    (timing,) = (t for t in record.timings if t.name == name)
    eager = record.seconds(record.of("eager")) or 0.0
    low, _, high = quantiles([x[record.headline] for x in timing.rounds], n=4, method="inclusive")
    return eager / high, eager / low
