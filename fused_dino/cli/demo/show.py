"""The demo's output in a terminal: a progress bar and the summary table."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from .report import Story


class Lasting(io.TextIOBase):
    """A stream that stops writing after an error: a full disk or a closed pipe costs the output, not the training."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    def isatty(self) -> bool:
        return self.stream.isatty()

    def write(self, text: str) -> int:
        self._attempt(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        if self.failure is None:
            try:
                act()
            except OSError as failure:
                self.failure = failure


@contextmanager
def printing(quiet: bool) -> Iterator[Console]:
    """Yield a console that prints text as it is. Raise an error of its output at the end."""
    out = Lasting(sys.stdout)
    yield Console(file=cast(TextIO, out), markup=False, emoji=False, highlight=False, quiet=quiet)
    if out.failure is not None:
        raise out.failure


def waiting(console: Console, text: str) -> Status:
    """Show a line while a block runs, with a spinner that every encoding has."""
    return console.status(Text(text), spinner="line")


@contextmanager
def learning(console: Console, steps: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar of `steps`, and yield a function that takes the loss and advances it by one."""
    columns = (
        TextColumn("Learning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3g}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"))
        yield lambda loss: progress.update(task, advance=1, loss=loss)


def summary(story: Story) -> Table:
    """Return a table of top-1 retrieval per photograph and of all: before, after, of the control, and by chance."""
    table = Table(title="Held-out captions find held-out crops: top-1", title_justify="left")
    table.add_column("photograph", overflow="fold")
    results = (story.before, story.after, story.control)
    for name in ("before", "after", "control", "chance"):
        table.add_column(name, justify="right", style="bold" if name == "after" else "")
    chance = f"{story.exam.chance:.2f}"
    for i, photo in enumerate(story.photos[:20]):
        table.add_row(photo.name, *(f"{result.per_photo[i]:.2f}" for result in results), chance)
    table.add_section()
    table.add_row(f"all {len(story.photos)}", *(f"{result.top1:.2f}" for result in results), chance)
    return table
