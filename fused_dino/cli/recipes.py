"""`fused-dino recipes`: list the published definitions, or show all of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from textwrap import fill
from typing import Any

import torch

from ..costs import on_meta, supervised
from ..gpus import GPUS
from ..recipes.catalogue import MISSING, RECIPES, Argument, Card, card, find_missing
from .errors import CommandError
from .estimate import Line, at_the_roofs, table

GPU, BATCH, SIDE, DTYPE = GPUS["h100"], 256, 256, "bfloat16"
HEADER = ["recipe", "aligns", "loss", "constants", "source"]


def run(names: Sequence[str] = (), json_: bool = False) -> int:
    cards = [card(find(name)) for name in names or RECIPES]
    if json_:
        costs = {x.name: {"cost": [line._asdict() for line in cost(x.name)]} if names else {} for x in cards}
        missing = {name: {"what": what, "needs": needs} for name, (what, needs) in MISSING.items()}
        print(json.dumps({"recipes": [document(x) | costs[x.name] for x in cards], "missing": missing}, indent=2))
    elif names:
        print("\n\n\n".join(map(page, cards)))
    else:
        print(columns([HEADER, *map(row, cards)]))
        print("\nfused-dino recipes NAME shows one. A term is missing for:")
        print(fill(", ".join(MISSING), 79, initial_indent="  ", subsequent_indent="  "))
    return 0


def find(name: str) -> str:
    """Return a recipe's name, or raise CommandError with what it needs, or with similar names."""
    if name in RECIPES:
        return name
    if why := find_missing(name):
        raise CommandError(why)
    near = get_close_matches(name.lower(), [*RECIPES, *MISSING], 3, 0.5)
    raise CommandError(f"{name!r} is no recipe; near are {', '.join(near or RECIPES)}")


def row(x: Card) -> list[str]:
    recipe = RECIPES[x.name]
    constants = ", ".join(f"{name}={value:g}" for name, value in x.constants.items())
    return [x.name, recipe.aligns, recipe.loss, constants, x.source.partition(";")[0]]


def document(x: Card) -> dict[str, Any]:
    recipe = RECIPES[x.name]
    arguments = [argument._asdict() for argument in x.arguments]
    return {**x._asdict(), "aligns": recipe.aligns, "loss": recipe.loss, "arguments": arguments}


# --- one recipe -------------------------------------------------------------------------------------------------------


def page(x: Card) -> str:
    """Return a recipe in plain text."""
    cells = [["argument", "default", "meaning"], *map(explained, x.arguments)]
    costs = f"{setting(x.name)}\n\n{table(cost(x.name), measured=False).plain()}"
    parts = [f"{x.name}: {x.summary}", x.formula, fill(x.details, 100), columns(cells), x.example, costs]
    return "\n\n".join([*parts, f"Source: {x.source}"])


def explained(x: Argument) -> list[str]:
    default = str(x.default)
    return [x.name, f"{default} ({x.of})" if x.of else default, x.meaning]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return columns of words, each as wide as its longest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, cells, widths)).rstrip() for cells in rows)


def setting(name: str) -> str:
    """Return a sentence on the run whose cost is calculated."""
    recipe = RECIPES[name]
    students = " and ".join(" x ".join(map(str, (BATCH, *shape))) for shape in recipe.students.values())
    start = f"Cost at the roofs of {GPU.name} in {DTYPE}: {BATCH} images of {SIDE} x {SIDE}, a student of {students}"
    if recipe.teacher is None:
        return f"{start}. The forward that makes the target is left out."
    return f"{start}, and {recipe.teacher}."


@cache
def cost(name: str) -> list[Line]:
    """Return the cost of a step under a recipe, counted on the supervision that the recipe returns."""
    recipe = RECIPES[name]
    (width,) = {shape[-1] for shape in recipe.students.values()}
    options: dict[str, Any] = {}
    if recipe.teacher is not None:
        options["teacher"] = on_meta(recipe.teacher, recipe.size, recipe.layers)
    with torch.device("meta"):
        supervision = recipe.make(width, **options)
    parts = supervised(supervision, BATCH, SIDE, recipe.students, getattr(torch, DTYPE))
    return at_the_roofs(parts, GPU, DTYPE, {})
