"""`pytest benchmarks`: every provider of every row is a test, whose rounds pytest-benchmark shows.

pytest-benchmark times one provider after the other, and a machine drifts meanwhile. So the harness measures the
providers of a row together, when the first of their tests runs, and each test replays what was recorded of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from . import harness, session
from .evidence import Record
from .session import Case

RECORDS: dict[str, Record] = {}  # of each case that was measured


class Replay:
    """A clock that advances by the recorded seconds of a round each time that it is told to."""

    __name__ = "replay"

    def __init__(self) -> None:
        self.now = 0.0
        self.rounds: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        self.now += next(self.rounds)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one telling row an op, in one direction")


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> list[pytest.Item] | None:
    """The tests of a module's BENCH: one a provider, row and direction."""
    if not isinstance(obj, harness.Bench) or name != "BENCH":
        return None
    device, quick = session.default_device(), collector.config.getoption("--quick")
    cases = session.plan([obj], device, quick)
    return [item(collector, case, name, device, quick) for case in cases for name in names(case, device)]


def names(case: Case, device: str) -> list[str]:
    return [provider.name for provider in harness.providers(case.bench, case.row, device, torch.empty(0))]


def item(collector: pytest.Module, case: Case, name: str, device: str, quick: bool) -> pytest.Item:
    clock = Replay()
    test = pytest.Function.from_parent(
        collector, name=f"{case}[{name}]", callobj=replayer(case, name, clock, device, quick)
    )
    test.add_marker(pytest.mark.benchmark(group=str(case), timer=clock))
    return test


def replayer(case: Case, name: str, clock: Replay, device: str, quick: bool) -> Callable[..., None]:
    def test(benchmark: Any) -> None:
        record = measured(case, device, quick)
        (timing,) = (t for t in record.timings if t.name == name)
        if timing.why and timing.role == "ours" and timing.why.startswith("wrong"):
            pytest.fail(timing.why)
        if timing.why:
            pytest.skip(timing.why)
        clock.rounds = iter([sample[record.headline] for sample in timing.rounds])
        benchmark.extra_info.update(precision=record.precision, errors=timing.errors)
        benchmark.pedantic(clock.advance, rounds=len(timing.rounds))

    return test


def measured(case: Case, device: str, quick: bool) -> Record:
    if str(case) not in RECORDS:
        RECORDS[str(case)] = session.record(case, device, session.SECONDS[quick])
    return RECORDS[str(case)]
