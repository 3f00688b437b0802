"""Render docs/performance.md, docs/costs.md and the README's table from benchmarks/results/*.json.

docs/gpu.md's table comes from predictions.py. No figure is typed by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from . import cost_page, evidence, judge, table
from .evidence import ROOT, Evidence

RESULTS, PAGE, README = ROOT / "benchmarks/results", ROOT / "docs/performance.md", ROOT / "README.md"
GPU_PAGE, COST_PAGE = ROOT / "docs/gpu.md", ROOT / "docs/costs.md"
WHOLE_MODELS = {"step", "teacher"}
BEGIN, END = "<!-- performance: rendered by make report -->", "<!-- performance: end -->"

PREAMBLE = """# Performance

`make report` renders this page from the files in `benchmarks/results/`, which hold every round of every provider. No
figure is typed by hand. A provider is one way to compute a row; `eager` is the seed in plain PyTorch. Providers take
turns in shuffled rounds. `time` is the median of the rounds, and `+-` their interquartile range over the median.

- `time` on a GPU is cold: GPU time alone, with the whole call enqueued and other data in the L2. `graph` is the time of
  a CUDA graph over more inputs than the L2 holds. `host` is the time that enqueuing a call takes.
- `GB/s` counts the least bytes that must be moved, so a provider that moves more looks slower. Whole models have
  `images/s` in its place.
- `roof` is the share of the nearer roof: the measured speed of a copy or of a matrix product. `in cache` says that the
  row is faster than memory, so no roof applies.
- `error` is the largest error of value and gradients against float64, over the largest true element. A provider whose
  error is above twice eager's and a few roundings is not timed.
"""


def write() -> int:
    """Render everything, and return the exit status."""
    evidences = load()
    PAGE.write_text(page(evidences), encoding="utf-8")
    COST_PAGE.write_text(cost_page.page(evidences), encoding="utf-8")
    for path, rendered in ((README, summary(evidences)), (GPU_PAGE, judge.expected().markdown())):
        path.write_text(insert(path.read_text(encoding="utf-8"), rendered, path.name), encoding="utf-8")
    pages = ", ".join(str(path.relative_to(ROOT)) for path in (PAGE, COST_PAGE, README, GPU_PAGE))
    print(f"Rendered {len(evidences)} results into {pages}")
    return 0


def load(folder: Path = RESULTS) -> dict[str, Evidence]:
    """Read the results by the files' stems, GPUs before CPUs."""
    found = {path.stem: evidence.load(path) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: (item[1].kind == "cpu", item[1].device["name"])))


def page(evidences: dict[str, Evidence]) -> str:
    """Return docs/performance.md: a section for each results file, in it a table for each op."""
    return "\n".join([PREAMBLE, *(section(stem, run) for stem, run in evidences.items())])


def section(stem: str, run: Evidence) -> str:
    parts = [f"## {table.heading(run)}", f"Evidence: `benchmarks/results/{stem}.json`. {table.roofs(run)}"]
    if run.ended != "complete":
        parts.append(f"The run did not reach its end ({run.ended}).")
    parts += table.remarks(run)
    if (foreseen := judge.beside(run)) is not None:
        parts += ["### Predicted and measured", "A target follows each figure: 30x/9x.", foreseen.markdown()]
    for op in table.ops(run):
        found = table.of_op(op, run)
        parts += [f"### {op}", found.markdown()]
        parts += ["\n".join(f"- {note}" for note in found.notes)] if found.notes else []
    return "\n\n".join(parts) + "\n"


def summary(evidences: dict[str, Evidence]) -> str:
    """Return the README's part: a table for each results file, since times of two devices do not compare.

    A run of whole models alone is shown in docs/costs.md.
    """
    parts = []
    for run in evidences.values():
        if {*table.ops(run)} <= WHOLE_MODELS:
            continue
        parts += [f"{table.device(run)}: {table.heading(run)}.", table.summary(run).markdown(), *table.remarks(run)]
    return "\n\n".join(parts)


def insert(text: str, rendered: str, name: str = "README.md") -> str:
    """Replace the text between the markers of a page."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{name} has no place for the table: {BEGIN} and {END}")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{rendered}\n\n{END}", text)
