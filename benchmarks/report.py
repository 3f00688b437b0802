"""What is rendered: docs/performance.md and the README's table from benchmarks/results/*.json, docs/gpu.md's from
predictions.py. No figure is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from . import evidence, judge, table
from .evidence import Evidence

ROOT = evidence.ROOT
RESULTS, PAGE, README = ROOT / "benchmarks/results", ROOT / "docs/performance.md", ROOT / "README.md"
GPU_PAGE = ROOT / "docs/gpu.md"
BEGIN, END = "<!-- performance: rendered by make report -->", "<!-- performance: end -->"

PREAMBLE = """# Performance

Rendered by `make report` from the files in `benchmarks/results/`, which hold every round of every provider; no figure
is typed by hand. `eager` is the recipe in plain PyTorch. Providers take turns in shuffled rounds; a time is the
median, and `+-` the interquartile range over it. On a GPU `time` is cold: of the GPU alone, which has the whole
call enqueued and other data in its L2; `graph` that of a CUDA graph over more inputs than the L2 holds; `host` what
enqueuing a call takes. GB/s and FLOP/s count the least that must be moved and computed, so that those of a provider
that does more look low. `error` is the largest of value and gradients against float64, over the largest true element;
who is off by more than twice eager's error and a few roundings is not timed. `in cache` is faster than memory, so that
no roof applies.
"""


def write() -> int:
    """Renders everything; -> the exit status."""
    from . import plots

    evidences = load()
    for stem, run in evidences.items():
        plots.save(run, PAGE.parent / picture(stem))
    PAGE.write_text(page(evidences), encoding="utf-8")
    for path, rendered in ((README, summary(evidences.values())), (GPU_PAGE, judge.expected().markdown())):
        path.write_text(insert(path.read_text(encoding="utf-8"), rendered, path.name), encoding="utf-8")
    pages = ", ".join(str(path.relative_to(ROOT)) for path in (PAGE, README, GPU_PAGE))
    print(f"Rendered {len(evidences)} results into {pages}")
    return 0


def load(folder: Path = RESULTS) -> dict[str, Evidence]:
    """By the files' stems, GPUs before CPUs."""
    found = {path.stem: evidence.load(path) for path in sorted(folder.glob("*.json"))}
    return dict(sorted(found.items(), key=lambda item: (item[1].kind == "cpu", item[1].device["name"])))


def picture(stem: str) -> str:
    return f"performance-{stem}.svg"


def page(evidences: dict[str, Evidence]) -> str:
    """docs/performance.md: a section a results file, in it a picture and a table an op."""
    return "\n".join([PREAMBLE, *(section(stem, run) for stem, run in evidences.items())])


def section(stem: str, run: Evidence) -> str:
    kind = table.device(run)
    parts = [f"## {table.heading(run)}", f"Evidence: `benchmarks/results/{stem}.json`. {table.roofs(run)}"]
    if run.ended != "complete":
        parts.append(f"The run did not reach its end ({run.ended}).")
    if kind == "CPU":
        parts.append("A CPU: ratios inside this run count, and say nothing of a GPU.")
    parts += [said for said in (table.busy(run), table.noise(run), table.slow_hosts(run)) if said]
    if (foreseen := judge.beside(run)) is not None:
        parts += ["### Predicted and measured", foreseen.markdown()]
    parts.append(f"![Speed of each provider over eager's, {kind}]({picture(stem)})")
    for op in dict.fromkeys(record.op for record in run.records):
        found = table.of_op(op, [run])
        parts += [f"### {op}", found.markdown()]
        parts += ["\n".join(f"- {note}" for note in found.notes)] if found.notes else []
    return "\n\n".join(parts) + "\n"


def summary(evidences: Iterable[Evidence]) -> str:
    """The README's: a table for each device, never one for two."""
    parts = []
    for (kind, _), runs in groupby(evidences, lambda run: (run.kind, run.device["name"])):
        same = list(runs)
        parts.append(f"{'GPU' if kind == 'cuda' else 'CPU'}: {table.heading(same[-1])}.")
        parts.append(table.summary(same).markdown())
        parts += [said for run in same for said in (table.busy(run), table.noise(run)) if said]
    return "\n\n".join(parts)


def insert(text: str, rendered: str, name: str = "README.md") -> str:
    """A page with what stands between the markers replaced."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{name} has no place for the table: {BEGIN} and {END}")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{rendered}\n\n{END}", text)
