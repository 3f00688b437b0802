"""A pytest plugin that runs fewer cases of each test; every two values of every two parameters still meet.

    PYTHONPATH=tests python -m pytest -p covering

A test of 5 ops, 9 inputs and 4 dtypes keeps 45 of 180 cases: each op meets each input and each dtype, and each input
meets each dtype. Tests of one or two parameters keep all of theirs.
"""

from collections.abc import Hashable, Iterable
from itertools import combinations, groupby
from typing import Any

import pytest


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen: set[pytest.Item] = set()
    for _, group in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        chosen.update(cover({item: meetings(parameters(item)) for item in group}))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def parameters(item: pytest.Item) -> dict[str, str]:
    """Return the parameters of a case by their names. A parameter that has an id is given by that."""
    values: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return {name: str(getattr(value, "name", value)) for name, value in values.items()}


def meetings(case: dict[str, str]) -> frozenset[Hashable]:
    """Return every pair of values in a case, or its only value."""
    return frozenset(combinations(sorted(case.items()), min(2, len(case))))


def cover(cases: dict[Any, frozenset[Hashable]]) -> Iterable[Any]:
    """Return cases, in their order, with every pair of values. Each was chosen for the most pairs left."""
    left = set().union(*cases.values())
    chosen = {case for case, met in cases.items() if not met}
    while left:
        best = max(cases, key=lambda case: len(left & cases[case]))
        chosen.add(best)
        left -= cases[best]
    return (case for case in cases if case in chosen)
