"""The tests of a run on a GPU: which ones are selected, and that each is reported at once."""

import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import copies
from benchmarks import device_tests, known

ROOT = Path(__file__).parent.parent
# Of a process that only collects: torch says that there is a GPU, and makes tensors of a module on the CPU.
SEEMS_TO_HAVE_A_GPU = """
import torch

torch.cuda.is_available = lambda: True
tensor = torch.tensor
torch.tensor = lambda *args, device=None, **options: tensor(*args, **options)


def pytest_deselected(items):
    with open("OUT", "w") as file:
        file.writelines(item.nodeid + "\\n" for item in items)
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """The ids of tests (selected, left out) by the stage `tests`, as they are collected on a GPU."""
    folder = tmp_path_factory.mktemp("collected")
    (folder / "seems.py").write_text(SEEMS_TO_HAVE_A_GPU.replace("OUT", str(folder / "left_out")))
    command = device_tests.command("tests", folder / "report", 1)
    code = f"import sys, pytest; sys.path.insert(0, {str(folder)!r}); sys.exit(pytest.main(sys.argv[1:]))"
    options = "-p", "seems", "--collect-only", "tests/test_random_shapes.py", *command[3:]
    run = copies.python("-c", code, *options, cwd=ROOT)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    selected = [line for line in run.stdout.splitlines() if "::" in line]
    return selected, (folder / "left_out").read_text().splitlines()


def parameters(test):
    return re.split(r"[\[\]-]", test)


class TestSelection:
    def test_only_what_needs_the_device_is_selected(self, collected):
        selected, _ = collected
        assert len(selected) > 1000
        for test in selected:
            if not test.startswith(tuple(f"tests/{file}" for file in device_tests.ALONE)):
                assert "triton" in parameters(test), test
                assert not {"reference", "torch"} & {*parameters(test)}, test
            assert "31st" not in test
            assert "random_shapes" not in test
            assert "test_any_size_mode_and_layout" not in test

    def test_the_rest_is_left_to_the_stage_that_is_asked_for(self, collected):
        selected, left_out = collected
        assert not {*selected} & {*left_out}
        for word in ("31st", "random_shapes", "reference", "test_any_size_mode_and_layout"):
            assert any(word in test for test in left_out), word

    def test_every_file_with_cases_by_implementation_is_named(self):
        by_implementation = re.compile(
            r"IMPLEMENTATIONS\)|usefixtures\(.backend.\)|def test\w+\([^)]*\b(backend|preprocess)\b"
        )
        texts = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
        found = {name for name, text in texts.items() if "\nfrom proving" in text and by_implementation.search(text)}
        assert found - {*device_tests.ALONE} == {*device_tests.SHARED, *device_tests.RANDOM}
        assert all((ROOT / "tests" / name).exists() for name in device_tests.ALONE)

    def test_no_file_needs_a_package_that_may_be_missing_where_a_gpu_is_rented(self):
        """An import that fails at the top of a file keeps all of its tests from running."""
        there = {"fused_dino", "benchmarks", "torch", "functorch", "numpy", "einops", "pytest", "triton", "timm"}
        there |= {path.stem for path in (ROOT / "tests").iterdir()}
        for name in (*device_tests.ALONE, *device_tests.SHARED, "conftest.py", "proving.py", "interpreter.py"):
            for node in ast.parse((ROOT / "tests" / name).read_text()).body:
                modules = (
                    [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in getattr(node, "names", ())]
                )
                for module in modules:
                    assert module.partition(".")[0] in there | sys.stdlib_module_names, f"{name} imports {module}"

    def test_each_known_failure_is_a_test_and_no_kernels(self, collected):
        selected, left_out = collected
        for pattern in known.KNOWN:
            found = [test for test in left_out if re.search(pattern, test)]
            assert found
            assert all("reference" in parameters(test) for test in found)
            assert not any(re.search(pattern, test) for test in selected)

    def test_several_workers_run_where_there_are_cpus(self, monkeypatch, tmp_path):
        def workers(cpus):
            command = device_tests.command("tests", tmp_path, cpus)
            return command[command.index("-n") + 1] if "-n" in command else None

        assert [workers(cpus) for cpus in (1, 2, 3, 4, 16)] == [None, None, None, "2", "12"]
        monkeypatch.setattr(device_tests, "find_spec", lambda name: None)
        assert workers(16) is None


TOY = """
import time
import pytest
from benchmarks import measure

each = pytest.mark.parametrize("backend", ["triton"])

@each
def test_fails(backend):
    assert 1 + 1 == 3, "sums are off"

@each
@pytest.mark.parametrize("other", ["reference"])
def test_gradients(backend, other):
    assert backend == KNOWN

@each
def test_loses_the_gpu(backend):
    measure.lost = lambda: True
    assert False, "a wrong address"

@each
def test_passes(backend):
    assert not measure.lost(), "it is tested by a process that has no GPU any more"

@each
def test_sleeps(backend):
    time.sleep(60)

def test_of_no_device():
    assert False
"""


def toy(tmp_path, *more, known="'reference'", name="test_resize.py"):
    """The command that runs TOY, and its report."""
    (tmp_path / name).write_text(TOY.replace("KNOWN", known))
    report = tmp_path / "report.jsonl"
    command = device_tests.command("tests", report, 1, (name,))
    return [*command[:-1], str(tmp_path / name), f"--rootdir={tmp_path}", *more], report


def outcomes(report):
    lines = map(json.loads, report.read_text().splitlines())
    return [(x["test"].partition("::")[2].partition("[")[0], x["outcome"]) for x in lines]


class TestTelling:
    def test_what_is_known_to_fail_fails_no_run(self, tmp_path):
        command, report = toy(tmp_path, "-k", "passes or gradients")
        run = copies.python(*command[1:], cwd=ROOT)
        assert run.returncode == 0, run.stdout
        assert outcomes(report) == [
            ("test_gradients", "began"), ("test_gradients", "known"),
            ("test_passes", "began"), ("test_passes", "passed"),
        ]  # fmt: skip
        assert "KNOWN test_resize.py::test_gradients[reference-triton] - eager's resize backward adds" in run.stdout

    def test_a_file_that_cannot_be_collected_costs_its_own_tests(self, tmp_path):
        (tmp_path / "test_broken.py").write_text("import no_such_package\n")
        command, report = toy(tmp_path, "-k", "passes or gradients", str(tmp_path / "test_broken.py"))
        assert copies.python(*command[1:], cwd=ROOT).returncode == 1
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        assert [(x["test"], x["outcome"]) for x in lines if x["outcome"] != "began"] == [
            ("test_broken.py", "failed"),
            ("test_resize.py::test_gradients[reference-triton]", "known"),
            ("test_resize.py::test_passes[triton]", "passed"),
        ]  # fmt: skip
        assert "no_such_package" in lines[0]["why"]

    def test_a_run_that_is_killed_has_told_of_what_failed(self, tmp_path):
        command, report = toy(tmp_path, "-k", "fails or sleeps")
        with (tmp_path / "log").open("w") as log:
            run = subprocess.Popen(command, cwd=ROOT, stdout=log)
            while not (report.exists() and ("test_sleeps", "began") in outcomes(report)):
                assert run.poll() is None
                time.sleep(0.05)
            run.kill()
            run.wait()
        assert outcomes(report) == [("test_fails", "began"), ("test_fails", "failed"), ("test_sleeps", "began")]
        text = (tmp_path / "log").read_text()
        assert "FAILED test_resize.py::test_fails[triton] - AssertionError: sums are off" in text
        assert "assert 1 + 1 == 3" in text, "the traceback"

    def test_a_worker_that_has_lost_its_gpu_is_replaced(self, tmp_path):
        pytest.importorskip("xdist")
        command, report = toy(tmp_path, "-k", "loses or passes", "-n", "1")
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1
        found = outcomes(report)
        assert ("test_loses_the_gpu", "failed") in found
        assert ("test_passes", "passed") in found
        assert "a wrong address" in report.read_text(), "what it died of is not lost"

    def test_alone_it_ends_there(self, tmp_path):
        command, report = toy(tmp_path, "-k", "loses or sleeps")
        run = copies.python(*command[1:], cwd=ROOT)
        assert run.returncode == 1
        assert ("test_sleeps", "began") not in outcomes(report)
