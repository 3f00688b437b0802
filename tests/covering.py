"""A pytest plugin: fewer cases of each test, among which every two values of every two parameters still meet.

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
    kept: set[pytest.Item] = set()
    for _, group in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        kept.update(cover({item: meetings(parameters(item)) for item in group}))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def parameters(item: pytest.Item) -> dict[str, str]:
    given: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return {name: str(getattr(value, "name", value)) for name, value in given.items()}


def meetings(given: dict[str, str]) -> frozenset[Hashable]:
    """What a case shows: every two of its values together, and its only one alone."""
    return frozenset(combinations(sorted(given.items()), min(2, len(given))))


def cover(cases: dict[Any, frozenset[Hashable]]) -> Iterable[Any]:
    """Cases, in their order, that together show what all do: chosen one by one, who shows most that is new."""
    left = set().union(*cases.values())
    kept = {case for case, shown in cases.items() if not shown}
    while left:
        best = max(cases, key=lambda case: len(left & cases[case]))
        kept.add(best)
        left -= cases[best]
    return (case for case in cases if case in kept)
