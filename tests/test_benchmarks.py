"""Test the rule for errors, the trial that excludes implementations, pytest-benchmark's times, and runs."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import proving
from benchmarks import command, evidence, harness, measure, roofs, session, table, yardstick
from benchmarks.shapes import BACKWARD, BATCHES, FORWARD, IMAGES, ROWS, STEPS, TEACHERS, Row

TINY = Row((4, 8), "as small as it gets", quick=True)
ROOT = Path(__file__).parents[1]
EPS = torch.finfo(torch.float32).eps


def tiny(recipe=lambda x, y: (x * y).mean(), peers=None, rows=(TINY,), **options):
    """An op of two inputs that nothing compiles, and whose one backend of ours is the recipe."""
    return harness.Bench(
        op="cosine_loss",
        rows=rows,
        inputs=lambda row, generator: tuple(harness.normal(row.shape, row, generator) for _ in range(2)),
        recipe=lambda row: recipe,
        ours=lambda row, backend: recipe,
        work=lambda row, direction: (100.0, 50.0),
        peers=peers or {},
        **options,
    )


@pytest.fixture
def uncompiled(monkeypatch):
    """Make torch.compile return its argument: compiling takes seconds, and these tests are about something else."""
    monkeypatch.setattr(harness, "compiled", lambda function, mode=None: function)


def scaled(factor):
    """Return a function that is wrong by a factor."""
    return lambda x: x.square().mean() * factor


def by_the_tests(factor):
    """Return the reason why tests/proving.py refuses a result, or None."""
    op = proving.Op(
        "toy",
        lambda x, backend: scaled(1.0 if backend == "reference" else factor)(x),
        (),
        scales=lambda x, grad_output: (x.double().square().mean(), 2 * x.double().abs().max() / x.numel()),
        inputs=("student",),
    )
    try:
        proving.check_accuracy(op, (torch.linspace(-1, 1, 32).view(4, 8),), "torch")
    except AssertionError as error:
        return str(error)
    return None


def by_the_benchmarks(factor):
    """Return the reason why the benchmarks do not time a result, or None."""
    bench = replace(tiny(recipe=scaled(1.0)), inputs=lambda row, generator: (torch.linspace(-1, 1, 32).view(4, 8),))
    trial = harness.Trial(harness.Case(bench, TINY, BACKWARD), "cpu")
    return trial.judge(harness.Provider("it", "peer", lambda: scaled(factor)))[0].why


class TestYardstick:
    def test_tests_and_benchmarks_refuse_the_same_planted_error(self, monkeypatch):
        assert by_the_tests(1.0) is by_the_benchmarks(1.0) is None
        said = by_the_tests(1.00001)
        assert said.startswith("value: error 1e-05, eager's ")
        assert by_the_benchmarks(1.00001).startswith("wrong, not timed: value: error 1e-05, eager's ")
        monkeypatch.setattr(yardstick.Error, "too_large", False)
        assert by_the_tests(1.00001) is by_the_benchmarks(1.00001) is None, "one rule decides for both"

    @pytest.mark.parametrize(("error", "eagers", "refused"), [
        (3e-4, 2e-4, False), (5e-4, 2e-4, True), (16 * EPS, 0.0, False), (17 * EPS, 0.0, True),
        (math.nan, 0.0, True), (math.inf, math.inf, True), (1e-3, math.nan, True),
    ])  # fmt: skip
    def test_what_is_allowed(self, error, eagers, refused):
        """Allow twice eager's error, a floor, here of 15 roundings, and one rounding of the result."""
        true, one = torch.ones(3, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        got, eager = (true + torch.tensor([0.0, x, 0.0], dtype=torch.float64) for x in (error, eagers))
        assert yardstick.compare(got.float(), eager.float(), true, one, 15 * EPS).too_large == refused

    def test_a_coarser_dtype_or_another_shape_than_eagers_is_allowed_nothing_more(self):
        true = torch.full((3,), 1.001, dtype=torch.float64)
        assert not yardstick.compare(true.bfloat16(), true.bfloat16(), true, true, 0.0).too_large
        assert yardstick.compare(true.bfloat16(), true.float(), true, true, 0.0).too_large
        assert yardstick.compare(true[:1], true, true, true, 1.0).too_large


@pytest.mark.usefixtures("uncompiled")
class TestDisqualification:
    def timings(self, peer, **options):
        bench = tiny(peers={"peer": peer}, **options)
        record = session.record(harness.Case(bench, TINY, BACKWARD), "cpu", 0.0)
        return {timing.name: timing for timing in record.timings}

    @pytest.mark.parametrize(
        ("peer", "says"),
        [
            (lambda x, y: (x * y).mean() * 1.001, "value: error 0.001"),
            (lambda x, y: (x * y.roll(1, 0)).mean(), ": error "),
            (lambda x, y: (x * y).mean().detach() + 0 * x.sum(), "gradient: error 1,"),
            (lambda x, y: (x * y).mean() * float("nan"), "value: error nan"),
            (lambda x, y: (x * y).mean(1), "value: error inf"),
        ],
        ids=["a scaled value", "wrong rows", "a zero gradient", "NaN", "a wrong shape"],
    )
    def test_a_wrong_provider_is_not_timed(self, peer, says):
        calls = []
        timing = self.timings(lambda row: lambda x, y: calls.append(1) or peer(x, y))["peer"]
        assert timing.why.startswith("wrong, not timed: ")
        assert says in timing.why
        assert timing.rounds == []
        assert len(calls) <= 2, "checked, and not called again"

    def test_a_right_one_is_timed_and_its_error_kept(self):
        timing = self.timings(lambda row: lambda x, y: (y * x).mean())["peer"]
        assert timing.why is None
        assert len(timing.rounds) >= measure.LEAST
        assert len(timing.errors) == 2
        assert max(timing.errors) < 1e-6

    def test_one_that_raises_ends_no_run_and_names_no_path(self):
        def peer(x, y):
            raise RuntimeError("no compiler at /home/someone/bin/g++, see /tmp/torchinductor_me/log.txt\nmore")

        timings = self.timings(lambda row: peer)
        assert timings["peer"].why == "could not run: RuntimeError: no compiler at g++, see log.txt"
        assert timings["eager"].rounds

    def test_one_that_is_not_installed_says_so(self):
        assert (
            self.timings(lambda row: importlib.import_module("no_such_package"))["peer"].why
            == "could not run: ModuleNotFoundError: No module named 'no_such_package'"
        )

    def test_a_backend_that_an_op_does_not_have_says_why(self):
        with pytest.raises(harness.Unavailable, match="no closed form yet|interpreter|GPU"):
            harness.ours(replace(tiny(), op="nothing", asks="cosine_loss"), TINY, "triton", "cpu")

    def test_tensors_are_weighed_by_a_gradient_that_differs_between_elements(self):
        bench = tiny(recipe=lambda x, y: x * y, peers={"flipped": lambda row: lambda x, y: (x * y).flip(0).flip(0)})
        timings = session.record(harness.Case(bench, TINY, BACKWARD), "cpu", 0.0).timings
        assert [t.why for t in timings] == [None] * len(timings)
        assert len(harness.grad_output_of(torch.ones(3, 4), TINY).unique()) == 12


@pytest.mark.usefixtures("uncompiled")
class TestRuns:
    def test_the_plan_takes_telling_rows_first_and_only_what_the_device_bears(self):
        rows = (Row((1, 2), "slow"), TINY, Row((9, 9), "elsewhere", on=("cuda",)))
        cases = session.plan([tiny(rows=rows)], "cpu", quick=False)
        assert [(case.row.shape, case.direction) for case in cases] == [
            ((4, 8), FORWARD), ((4, 8), BACKWARD), ((1, 2), FORWARD), ((1, 2), BACKWARD),
        ]  # fmt: skip
        assert [case.direction for case in session.plan([tiny(rows=rows)], "cpu", quick=True)] == [BACKWARD]

    @pytest.fixture(autouse=True)
    def no_roofs(self, monkeypatch):
        monkeypatch.setattr(roofs, "measure_roofs", lambda device, precisions: {"copy": 1e10, "IEEE": 1e11})

    def test_a_run_writes_after_every_row_and_loads_as_it_was(self, tmp_path):
        path = tmp_path / "run.json"
        seen = []
        cases = session.plan([tiny()], "cpu", quick=False)

        def starting(case):
            if path.exists():
                kept = evidence.load(path)
                seen.append((kept.ended, len(kept.records)))

        run = session.run(cases, device="cpu", path=path, self_check=True, starting=starting)
        assert seen == [("never", 1)]
        assert run.ended == "complete"
        assert asdict(evidence.load(path)) == asdict(run)
        assert len(run.noise()) == 2
        assert "differs from itself" in table.report(run, 2)

    def test_one_that_cannot_be_timed_ends_no_run(self, monkeypatch):
        def refuses(timing, *_):
            if timing.role == "ours":
                raise RuntimeError("it waits")
            return lambda: {"wall": 1.0}

        monkeypatch.setattr(session, "sampler", refuses)
        monkeypatch.setattr(session, "SECONDS", dict.fromkeys((True, False), 0.0))
        (record,) = session.run(session.plan([tiny()], "cpu", True), device="cpu").records
        assert {t.role: t.why for t in record.timings if t.why} == {
            "ours": "could not be timed: RuntimeError: it waits"
        }
        assert record.of("ours") is None

    def test_a_lost_gpu_ends_the_run_and_keeps_what_was_measured(self, monkeypatch, tmp_path):
        real = session.record

        def record(case, *options):
            if case.direction == BACKWARD:
                raise RuntimeError("an illegal memory access")
            return real(case, "cpu", 0.0)

        monkeypatch.setattr(session, "record", record)
        cases = session.plan([tiny()], "cpu", False)
        with pytest.raises(RuntimeError, match="illegal"):  # of which the GPU knows nothing
            session.run(cases, device="cpu")
        monkeypatch.setattr(measure, "lost", lambda: True)
        run = session.run(cases, device="cpu", path=tmp_path / "x.json")
        assert run.ended.startswith("the GPU was lost in cosine_loss 4 x 8 float32")
        assert len(evidence.load(tmp_path / "x.json").records) == 1

    def test_ctrl_c_keeps_what_was_measured(self, tmp_path):
        def starting(case):
            if case.direction == BACKWARD:
                raise KeyboardInterrupt

        path = tmp_path / "run.json"
        run = session.run(session.plan([tiny()], "cpu", False), device="cpu", path=path, starting=starting)
        assert run.ended == "interrupted"
        assert [record.direction for record in evidence.load(path).records] == [FORWARD]
        assert "Measured 1 of 2" in table.report(run, 2)

    def test_the_time_may_run_out(self):
        run = session.run(session.plan([tiny()], "cpu", False), device="cpu", seconds=0.0)
        assert (run.ended, run.records) == ("out of time", [])
        assert "Measured 0 of 2" in table.report(run, 2)

    def test_parts_are_timed_beside_the_whole(self):
        bench = tiny(parts=lambda row, x, y: {"product": lambda: x * y})
        run = session.run(session.plan([bench], "cpu", True), device="cpu")
        assert "of fused_dino torch: product" in table.report(run, 1)
        assert run.records[0].images == TINY.shape[0]

    def test_a_model_counts_images_and_has_no_backends(self):
        record = session.record(harness.Case(tiny(backends=False), TINY, FORWARD), "cpu", 0.0)
        assert [t.name for t in record.timings] == ["eager", "torch.compile", "fused_dino"]
        run = evidence.Evidence({"kind": "cpu", "name": "x", "threads": 1, "cores": 1}, {"torch": "2"}, None, "", False)
        assert table.of_record(record, run).header[4] == "images/s"
        assert session.record(harness.Case(tiny(), TINY, FORWARD), "cpu", 0.0).images is None

    def test_on_a_gpu_the_teacher_and_the_step_are_among_the_first_rows(self):
        cases = session.plan(harness.benches().values(), "cuda", quick=False)
        quick = [case.bench.op for case in cases if case.row.quick]
        assert [case.row.quick for case in cases[: len(quick)]] == [True] * len(quick)
        assert quick[-2:] == ["step", "teacher"]
        tuned = [
            case.bench.op
            for case in cases
            if any("tuned" in provider.name for provider in harness.providers(case, "cuda"))
        ]
        assert tuned == [op for op in quick if op != "step"], "a step's tuning would repeat its teacher's"

    def test_a_part_that_cannot_be_timed_ends_no_run(self):
        bench = tiny(parts=lambda row, x, y: {"product": lambda: 1 / 0})
        (record,) = session.run(session.plan([bench], "cpu", True), device="cpu").records
        assert record.timings[-1].why == "could not be timed: ZeroDivisionError: division by zero"
        assert record.of("ours") is not None

    def test_evidence_tells_where_it_was_made_and_no_secret(self, tmp_path):
        import getpass
        import platform

        path = tmp_path / "run.json"
        session.run(session.plan([tiny()], "cpu", True), device="cpu", path=path)
        text = path.read_text()
        assert evidence.load(path).device["threads"] == torch.get_num_threads()
        assert evidence.load(path).versions["torch"] == torch.__version__
        assert not re.search(r"\"/|: \"[^\"]*/(home|root|work|tmp|usr)/", text)
        assert f'"{platform.node()}' not in text
        assert f"/{getpass.getuser()}/" not in text

    def test_a_file_that_is_no_evidence_is_refused(self, tmp_path):
        for content in ("", "[]", "{}", '{"schema": 1, "records": []}', '{"schema": 2, "records": []}'):
            (tmp_path / "x.json").write_text(content)
            with pytest.raises(ValueError, match=r"x\.json is no results file"):
                evidence.load(tmp_path / "x.json")


TOY = """
import time
from functools import partial
from benchmarks import measure
from benchmarks.harness import Bench, normal
from benchmarks.shapes import Row

measure.interleave = measure.host_sampler = None  # nothing of what a run measures with

def dot(x, factor=1.0, seconds=0.0):
    time.sleep(seconds)
    return x.square().mean() * factor

BENCH = Bench(
    op="cosine_loss",
    rows=(Row((4, 8), "ours is right"), Row((3, 8), "ours is wrong", "bfloat16")),
    inputs=lambda row, generator: (normal(row.shape, row, generator),),
    recipe=lambda row: dot,
    ours=lambda row, backend: partial(dot, factor=1.0 if row.shape[0] == 4 else 1.5),
    work=lambda row, direction: (1.0, 1.0),
    peers={"slow": lambda row: partial(dot, seconds=0.02), "wrong": lambda row: partial(dot, factor=1.5)},
)
"""


class TestFace:
    """pytest-benchmark times the implementations of the same rows by itself, once they have passed the same trial."""

    def test_a_planted_sleep_shows_in_its_statistics_and_what_is_wrong_is_not_timed(self, tmp_path):
        pytest.importorskip("pytest_benchmark")
        (tmp_path / "test_toy.py").write_text(TOY)
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.conftest", str(tmp_path / "test_toy.py"),
                   f"--rootdir={tmp_path}", "-rs", "-p", "no:cacheprovider", "-k", "backward and not compile",
                   "--benchmark-max-time=0.1", f"--benchmark-json={tmp_path / 'x.json'}"]  # fmt: skip
        # A worker of pytest-xdist times nothing.
        environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        found = json.loads((tmp_path / "x.json").read_text())["benchmarks"]
        right, wrong = (
            f"cosine_loss {row}, forward + backward" for row in ("4 x 8 float32 (IEEE)", "3 x 8 bfloat16 (bf16)")
        )
        assert [(x["group"], x["name"].partition("[")[2]) for x in found] == [
            (right, "eager]"), (right, "fused_dino torch]"), (right, "slow]"), (wrong, "eager]"), (wrong, "slow]"),
        ]  # fmt: skip
        for x in found:
            assert (x["stats"]["min"] >= 0.02) == ("slow" in x["name"])
            assert x["stats"]["rounds"] >= 5
            assert len({*x["stats"]["data"]}) > 1
        assert done.returncode == 1
        assert "1 failed, 5 passed, 2 skipped" in done.stdout
        assert "Failed: wrong, not timed: value: error 0.5" in done.stdout


class TestShapes:
    @pytest.mark.parametrize("rows", [ROWS, IMAGES, BATCHES, TEACHERS, STEPS])
    def test_each_has_a_reason_and_differs_from_the_others(self, rows):
        assert all(row.reason for row in rows)
        for device in ("cpu", "cuda"):
            names = [(str(row), row.precision) for row in rows if device in row.on]
            assert len(set(names)) == len(names) > 0

    @pytest.mark.parametrize("bench", harness.benches().values(), ids=lambda bench: bench.op)
    def test_inputs_are_those_of_the_row_repeatable_and_never_zero(self, bench):
        row = next(row for row in bench.rows if row.on != ("cuda",))
        inputs, again = (harness.Case(bench, row, FORWARD).draw("cpu") for _ in range(2))
        for x, y in zip(inputs, again, strict=True):
            assert torch.equal(x, y)
            assert x.dtype == getattr(torch, row.dtype)
            assert x.count_nonzero() > 0.9 * x.numel()

    def test_layouts(self):
        generator = torch.Generator().manual_seed(0)
        transposed = harness.normal((4, 6), Row((4, 6), "", options={"layout": "transposed"}), generator)
        assert transposed.shape == (4, 6)
        assert transposed.stride() == (1, 4)
        last = harness.normal((2, 3, 4, 4), Row((2, 3, 4, 4), "", options={"layout": "channels_last"}), generator)
        assert last.is_contiguous(memory_format=torch.channels_last)

    def test_each_op_in_the_quick_selection_has_a_row_for_every_device(self):
        for rows in (ROWS, IMAGES, BATCHES):
            assert {kind for row in rows if row.quick for kind in row.on} == {"cpu", "cuda"}


def test_cosine_end_to_end_on_a_tiny_row(tmp_path, monkeypatch, capsys):
    """Every provider of the real declaration, torch.compile among them, is right, timed and printed."""
    monkeypatch.setattr(roofs, "CPU_COPY", 2**16)
    monkeypatch.setattr(roofs, "CPU_SIDE", 32)
    cosine = harness.benches()["cosine_loss"]
    cosine = replace(cosine, rows=(TINY,))
    monkeypatch.setattr(harness, "benches", lambda: {"cosine_loss": cosine})
    assert command.bench(op="cosine_loss", quick=True, json=tmp_path / "x.json", self_check=True) == 0
    out = capsys.readouterr().out
    (record,) = evidence.load(tmp_path / "x.json").records
    assert [t.why for t in record.timings] == [None] * len(record.timings), out
    assert {t.role for t in record.timings} == {"eager", "again", "compile", "ours"}
    assert "cosine_loss: " in out
