"""Run the tests that need a GPU: a plugin of pytest selects them, and reports each at once.

    python3 -m pytest -p benchmarks.device_tests --stage tests --report tests.jsonl FILES

A failure is printed when it happens. Every test becomes a line of the report, so that a run that is killed leaves its
findings. Tests that are known to fail (known.py) are reported apart and do not fail the run. A process that has lost
its GPU ends, since each of its later tests would fail. pytest-xdist then starts another.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from . import known, measure

STAGES = ("tests", "wide")
# Files of which every test runs, then files of which the cases of the kernels run.
ALONE = ("test_gpu.py", "test_kernels.py", "test_vicreg_planes.py")
SHARED = (
    "test_ops.py", "test_vicreg.py", "test_vicreg_limits.py", "test_vicreg_definitions.py", "test_resize.py",
    "test_resize_properties.py", "test_cosine_properties.py", "test_cosine_index.py", "test_standardize.py",
    "test_patches.py", "test_tokens.py", "test_forward_mode.py", "test_vicreg_branches.py", "test_masks.py",
    "test_terms.py", "test_token_options.py",
)  # fmt: skip
RANDOM = ("test_random_shapes.py",)
WORKERS = 12  # at most: the kernels compile on the CPU


def command(stage: str, report: Path, cpus: int, files: tuple[str, ...] | None = None) -> list[str]:
    """Return the command for the tests of a stage. It leaves two of the CPUs alone."""
    chosen = files or (*ALONE, *SHARED, *(RANDOM if stage == "wide" else ()))
    workers = min(WORKERS, cpus - 2) if find_spec("xdist") else 1
    several = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else []
    quiet = ["-q", "-p", "no:cacheprovider", "--tb=short", "--no-summary", "--continue-on-collection-errors"]
    plugin = ["-p", __name__, "--stage", stage, "--report", str(report)]
    return [sys.executable, "-m", "pytest", *quiet, *several, *plugin, *(f"tests/{name}" for name in chosen)]


def needed(item: pytest.Item) -> bool:
    """Tell whether a test belongs to the stage `tests`: it runs the kernels, or needs a GPU.

    Random shapes are left out, since each is compiled anew. So are offsets past 2^31, which take gigabytes.
    """
    of_kernels = item.path.name in ALONE or "triton" in getattr(getattr(item, "callspec", None), "params", {}).values()
    random = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    return of_kernels and not random and "31st" not in item.name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stage", choices=STAGES, required=True, help="a GPU's run, or the tests that it leaves out")
    parser.addoption("--report", type=Path, required=True, metavar="FILE", help="a line of JSON a test, as it ends")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wide = config.getoption("--stage") == "wide"
    left_out = [item for item in items if needed(item) == wide]
    items[:] = [item for item in items if needed(item) != wide]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    worker = hasattr(config, "workerinput")
    if not worker:
        config.pluginmanager.register(Teller(config))
    if worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Runner(alone=not worker))


class Runner:
    """Watch the GPU of a process that runs tests: a worker of pytest-xdist, or the only process."""

    def __init__(self, alone: bool) -> None:
        self.alone = alone

    @pytest.hookimpl(trylast=True)  # the report is on its way
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and measure.lost():
            if self.alone:
                pytest.exit("the GPU is lost, and every later test would fail", returncode=1)
            os._exit(1)


class Teller:
    """Write the report: a line for each test that begins, ends or cannot be collected."""

    def __init__(self, config: pytest.Config) -> None:
        self.terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
        self.file = config.getoption("--report").open("w")
        self.failed = False

    def tell(self, test: str, outcome: str, **more: Any) -> None:
        self.file.write(json.dumps({"test": test, "outcome": outcome, **more}) + "\n")
        self.file.flush()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell(nodeid, "began")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.fail(report)
        elif report.when == "call" or report.skipped:
            self.tell(report.nodeid, report.outcome, seconds=round(report.duration, 3))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.fail(report)

    def fail(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        why, expected = cause(report.longreprtext), known.reason(report.nodeid)
        self.failed |= expected is None
        self.tell(report.nodeid, "known" if expected else "failed", why=expected or why)
        self.terminal.ensure_newline()
        self.terminal.write_line(f"{'KNOWN' if expected else 'FAILED'} {report.nodeid} - {expected or why}")
        self.terminal.write_line(report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.TESTS_FAILED and not self.failed:
            session.exitstatus = pytest.ExitCode.OK
        self.file.close()


def cause(text: str) -> str:
    """Return the first line of the exception in a traceback of pytest, else its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line[1:].strip() for line in lines if line.startswith("E  ")]
    return (errors or [line.strip() for line in lines[-1:]] or [""])[0][:300]
