"""Have pytest-benchmark measure every implementation of every row: `pytest benchmarks`.

Each implementation is a test. It is timed once it has passed the same trial as in `python -m benchmarks run`. A round
is the wall time of calls that each wait for the GPU. Implementations follow one another, so that a drift of the machine
enters their ratios. `python -m benchmarks run` interleaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest

from . import harness, measure, roofs, session


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one telling row an op, in one direction")


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> list[pytest.Item] | None:
    """Make the tests of a module's BENCH: one for each row, direction and implementation."""
    if not isinstance(obj, harness.Bench) or name != "BENCH":
        return None
    device = session.default_device()
    tests = [
        pytest.Function.from_parent(collector, name=f"{case}[{provider.name}]", callobj=test_of(case, provider, device))
        for case in session.plan([obj], device, collector.config.getoption("--quick"))
        for provider in harness.providers(case, device)
    ]
    for test in tests:
        test.add_marker(pytest.mark.benchmark(group=test.name.partition("[")[0]))
    return list(tests)


def test_of(case: harness.Case, provider: harness.Provider, device: str) -> Callable[..., None]:
    def test(benchmark: Any) -> None:
        with roofs.matrix_precision(case.row.tf32):
            trial = trial_of(case, device)
            timing, function = trial.judge(provider)
            if function is None:
                why = str(timing.why)
                (pytest.fail if timing.role == "ours" and not why.startswith("not run") else pytest.skip)(why)
            benchmark.extra_info.update(precision=case.row.precision, errors=timing.errors)
            benchmark(measure.waiting(trial.bind(function), device))

    return test


trial_of = lru_cache(maxsize=1)(harness.Trial)  # the tests of a row follow one another
