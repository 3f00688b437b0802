"""The plugin covering leaves cases out, and keeps every pair of values that occurs in some case."""

import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

import covering

OPS, SIZES, DTYPES = ("cosine", "mse"), range(9), ("float64", "float32", "bfloat16", "float16")
CASES = [{"op": op, "size": size, "dtype": dtype} for op, size, dtype in product(OPS, SIZES, DTYPES)]


def cover(cases):
    return [cases[i] for i in covering.cover({i: covering.meetings(case) for i, case in enumerate(cases)})]


def test_every_two_values_meet_in_half_of_the_cases():
    some = cover(CASES)
    for first, second in combinations(("op", "size", "dtype"), 2):
        assert {(x[first], x[second]) for x in some} == {(x[first], x[second]) for x in CASES}
    assert len(SIZES) * len(DTYPES) <= len(some) <= 40


@pytest.mark.parametrize("names", [(), ("size",), ("size", "dtype")], ids=str)
def test_of_few_parameters_every_case_stands_once_and_in_its_order(names):
    cases = [dict(x) for x in dict.fromkeys(tuple((name, x[name]) for name in names) for x in CASES)]
    assert cover(cases) == cases


SUITE = """
import pytest

@pytest.mark.parametrize("x", [1, 2])
@pytest.mark.parametrize("y", ["left", "right"])
@pytest.mark.parametrize("z", [True, False])
def test_three(x, y, z): pass

def test_alone(): pass
"""


@pytest.mark.parametrize(("options", "count"), [([], 5), (["-k", "left"], 4), (["-k", "alone"], 1)])
def test_what_pytest_runs(options, count, tmp_path):
    (tmp_path / "test_suite.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "covering", *options, "test_suite.py"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(covering.__file__).parent),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"\n{count} passed" in done.stdout, done.stdout + done.stderr
