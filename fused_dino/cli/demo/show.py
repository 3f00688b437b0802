"""The demo's output in a terminal: a progress bar and the summary table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .report import Story


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
    table.add_column("photograph")
    results = (story.before, story.after, story.control)
    for name in ("before", "after", "control", "chance"):
        table.add_column(name, justify="right", style="bold" if name == "after" else "")
    chance = f"{story.exam.chance:.2f}"
    for i, photo in enumerate(story.photos[:20]):
        table.add_row(photo.name, *(f"{result.per_photo[i]:.2f}" for result in results), chance)
    table.add_section()
    table.add_row(f"all {len(story.photos)}", *(f"{result.top1:.2f}" for result in results), chance)
    return table
