"""What a terminal shows of a run: a bar with rich, plain lines without it; then tables, and a sentence an op."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from . import table
from .evidence import Evidence
from .session import Case


@contextmanager
def progress(total: int) -> Iterator[Callable[[Case], Any]]:
    """Yields what is to be told of each case before it is measured."""
    if find_spec("rich") is None:
        yield lambda case: print(f"measuring {case}", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    text = TextColumn("{task.description}", table_column=Column(no_wrap=True, ratio=1))
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), text)
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
        task = bar.add_task("measuring the roofs", total=total, completed=0)
        started = iter(range(total + 1))
        yield lambda case: bar.update(task, description=str(case), completed=next(started))


def report(evidence: Evidence, planned: int, width: int | None = None) -> str:
    """Everything that was measured, and at its end one sentence an op."""
    width = width or shutil.get_terminal_size().columns
    parts = [table.heading(evidence), table.roofs(evidence)] if evidence.roofs else [table.heading(evidence)]
    parts += ["\n" + table.of_record(record, evidence, width).plain() for record in evidence.records]
    parts.append("")
    if len(evidence.records) < planned:
        parts.append(f"Measured {len(evidence.records)} of {planned}: the run was ended early.")
    parts += [said for said in (table.busy(evidence), table.noise(evidence), table.slow_hosts(evidence)) if said]
    if evidence.kind == "cpu" and evidence.records:
        parts.append("These are a CPU's times: ratios inside this run count, and say nothing of a GPU.")
    parts += [table.sentence(op, evidence) for op in dict.fromkeys(r.op for r in evidence.records)]
    return "\n".join(wrapped(part, width) for part in parts)


def wrapped(text: str, width: int) -> str:
    """Prose to the width; the tables have theirs."""
    return text if "\n" in text else textwrap.fill(text, width, subsequent_indent="  ")
