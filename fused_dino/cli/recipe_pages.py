"""Render the pages in docs/recipes/ from each recipe's docstring and cost: `make recipes`.

Pitfalls, and the lines that a recipe replaces, are written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..benchmarks.table import Table, time
from ..recipes.catalogue import MISSING, RECIPES, card
from .estimate import number
from .recipes import HEADER, cost, explained, row, setting

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs/recipes"
BEGIN, END = "<!-- rendered by make recipes -->", "<!-- end -->"


def main() -> None:
    """Render every page in place."""
    for path, rendered in pages().items():
        path.write_text(insert(path.read_text(encoding="utf-8"), rendered, path.name), encoding="utf-8")
    print(f"Rendered {len(pages())} pages in {FOLDER}")


def pages() -> dict[Path, str]:
    """Return the rendered part of each page."""
    return {FOLDER / "README.md": index(), **{FOLDER / f"{name}.md": page(name) for name in RECIPES}}


def index() -> str:
    rows = [row(card(name)) for name in RECIPES]
    linked = [[f"[{name}]({name}.md)", *rest] for name, *rest in rows]
    missing = [[name, what, needs] for name, (what, needs) in MISSING.items()]
    return "\n\n".join([markdown([HEADER, *linked]), "A term is missing for these:",
                        markdown([["name", "what it is", "what it needs"], *missing])])  # fmt: skip


def page(name: str) -> str:
    x = card(name)
    arguments = markdown([["argument", "default", "meaning"], *map(explained, x.arguments)])
    parts = [
        f"`recipes.{name}` returns {x.summary}", f"```text\n{x.formula}\n```", x.details, arguments,
        f"```python\n{x.example}\n```", setting(name), costs(name), f"Source: {x.source}",
    ]  # fmt: skip
    return "\n\n".join(parts)


def costs(name: str) -> str:
    """Return the cost of each part, without the teacher's bytes and time, which depend on the release of timm."""
    lines = [
        [
            x.part,
            number(x.flops / 1e9),
            *("" if x.part == "teacher" else y for y in (number(x.bytes / 1e9), time(x.seconds))),
        ]
        for x in cost(name)[:-1]
    ]
    return Table(["part", "GFLOP", "GB", "at the roofs"], lines).markdown()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *rest = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rest])


def insert(text: str, rendered: str, name: str) -> str:
    """Replace the text between the marks of a page."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"{name} must have a place for what is rendered: {BEGIN} and {END}")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{BEGIN}\n\n{rendered}\n\n{END}", text)


if __name__ == "__main__":
    main()
