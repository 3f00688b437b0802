"""Smoke and the memory checkers' cases, without a GPU: what is measured of a row, and that no variant is left out."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import exercise, harness, judge, measure, roofs, smoke
from benchmarks.shapes import BACKWARD, FORWARD, Row

ROWS = (Row((4, 8), "small"), Row((3, 8), "smaller"), Row((5, 8), "quick", quick=True))


def toy(op="cosine_loss", ours=lambda x, y: (x * y).mean(), rows=ROWS):
    return harness.Bench(
        op=op,
        rows=rows,
        inputs=lambda row, generator: tuple(harness.normal(row.shape, row, generator) for _ in range(2)),
        recipe=lambda row: lambda x, y: (y * x).mean(),
        ours=lambda row, backend: ours,
        work=lambda row, direction: (100.0, 50.0),
    )


@pytest.fixture
def benches(monkeypatch):
    def use(*found):
        monkeypatch.setattr(harness, "benches", lambda: {bench.op: bench for bench in found})

    use(toy())
    return use


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE", 1e-4)


def lines(out):
    return [json.loads(line) for line in (out / "smoke.jsonl").read_text().splitlines()][1:]


@pytest.mark.usefixtures("benches")
class TestSmoke:
    def test_each_row_is_checked_and_is_a_line(self, tmp_path, capsys):
        assert smoke.main([str(tmp_path), "--device", "cpu"]) == 0
        found = lines(tmp_path)
        assert [(x["row"], x["direction"]) for x in found] == [("3 x 8 float32", d) for d in (BACKWARD, FORWARD)]
        assert all(x["wrong"] is None and x["repeats"] and x["host_us"] > 0 for x in found)
        assert "2 of 2 rows, 0 wrong, 0 whose bits differ" in capsys.readouterr().out

    def test_what_is_wrong_fails_it(self, tmp_path, benches, capsys):
        benches(toy(ours=lambda x, y: (x * y).mean() * 1.01))
        assert smoke.main([str(tmp_path), "--device", "cpu"]) == 1
        assert lines(tmp_path)[0]["wrong"].startswith("value: error 0.01, ")
        assert "2 of 2 rows, 2 wrong" in capsys.readouterr().out

    def test_bits_that_differ_fail_it(self, tmp_path, benches):
        noise = iter(range(10**6))
        benches(toy(ours=lambda x, y: (x * y).mean() + 1e-8 * next(noise)))
        assert smoke.main([str(tmp_path), "--device", "cpu"]) == 1
        assert not any(x["wrong"] for x in lines(tmp_path))
        assert not all(x["repeats"] for x in lines(tmp_path))

    def test_a_crash_is_a_row_that_is_wrong(self, tmp_path, benches):
        def crash(x, y):
            raise RuntimeError("no such kernel")

        benches(toy(ours=crash), toy("mse_loss"))
        assert smoke.main([str(tmp_path), "--device", "cpu"]) == 1
        assert [x["wrong"] for x in lines(tmp_path)] == ["RuntimeError: no such kernel", None] * 2

    def test_rows_that_are_left_are_said(self, tmp_path, capsys):
        assert smoke.main([str(tmp_path), "--device", "cpu", "--seconds", "-1"]) == smoke.OUT_OF_TIME
        assert "0 of 2 rows" in capsys.readouterr().out

    def test_it_goes_on_where_it_was(self, tmp_path):
        smoke.main([str(tmp_path), "--device", "cpu"])
        path = tmp_path / "smoke.jsonl"
        head, first, second = path.read_text().splitlines(keepends=True)
        path.write_text(head + first.replace('"wrong": null', '"wrong": "off"') + second[:20])
        assert len(smoke.read(path)) == 2, "a line that a kill cut short is none"
        path.write_text(head + first.replace('"wrong": null', '"wrong": "off"'))
        assert smoke.main([str(tmp_path), "--device", "cpu", "--resume"]) == 1, "what was wrong before counts"
        assert [x["direction"] for x in smoke.read(path)[1:]] == [BACKWARD, FORWARD]

    def test_a_row_that_takes_the_gpu_costs_itself_alone(self, tmp_path, monkeypatch):
        """A new process goes on with the rows that are left, in the time that is left."""

        class Replaced(Exception):
            pass

        def execv(path, command):
            raise Replaced(command)

        monkeypatch.setattr(smoke, "chosen", lambda *_: [smoke.Case(toy(), row, BACKWARD) for row in ROWS])
        found = {"op": "cosine_loss", "precision": "IEEE", "direction": BACKWARD, "wrong": "an illegal address"}
        monkeypatch.setattr(smoke, "row_of", lambda case, *_: {**found, "row": str(case.row)})
        monkeypatch.setattr(smoke.evidence, "describe", lambda device: {"name": "NVIDIA H100"})
        monkeypatch.setattr(roofs, "measure_roofs", lambda *_: {"copy": 1e12})
        monkeypatch.setattr(measure, "lost", lambda: True)
        monkeypatch.setattr(smoke.os, "execv", execv)
        with pytest.raises(Replaced) as replaced:
            smoke.main([str(tmp_path), "--seconds", "100"])
        command = replaced.value.args[0]
        assert "--resume" in command
        assert 90 <= float(command[command.index("--seconds") + 1]) <= 100
        assert len(lines(tmp_path)) == 1

    def test_on_a_gpu_every_row_is_taken_and_the_telling_ones_first(self):
        found = smoke.order(smoke.chosen(real().values(), "cuda"))
        assert {str(case) for case in found} == {
            str(case)
            for case in smoke.session.plan(real().values(), "cuda", quick=False)
            if case.bench.op not in ("teacher", "step")
        }
        last = [case.direction == case.row.directions[-1] for case in found]
        assert last == sorted(last, reverse=True), "rows in their last direction first"
        assert [case.bench.op for case in found[:4]] == list(dict.fromkeys(case.bench.op for case in found)), "by turns"
        for case in found[:8]:
            assert judge.predictions_of(case.bench.op, str(case.row), case.direction, case.row.precision), case

    def test_on_a_cpu_the_smallest_row_of_each_op_is(self):
        assert {str(case.row) for case in smoke.chosen(real().values(), "cpu")} == {
            "257 x 1000 float32", "8 x 3 x 250 x 333 float32 size=224",
        }  # fmt: skip


real = harness.benches  # before a test replaces it


def test_a_gpus_row_has_its_times_and_its_kernels(monkeypatch):
    """Each figure is in its place. Measuring them needs a GPU."""
    monkeypatch.setattr(harness.Case, "draw", lambda case, device: case.bench.inputs(case.row, torch.Generator()))
    monkeypatch.setattr(harness, "ours", lambda bench, row, backend, device: bench.ours(row, backend))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    hosts = iter([30e-6, 20e-6])
    monkeypatch.setattr(measure, "enqueue", lambda call: next(hosts))
    monkeypatch.setattr(measure, "cold", lambda call, host: {30e-6: 100e-6}[host])
    monkeypatch.setattr(measure, "rotate", lambda inputs: [inputs] * 3)
    monkeypatch.setattr(measure, "capture", lambda calls: calls)
    monkeypatch.setattr(measure, "replay", lambda graph: 90e-6 * len(graph))
    monkeypatch.setattr(smoke, "kernels", lambda call: {"a_kernel": 80.0})
    line = smoke.row_of(smoke.Case(toy(), ROWS[0], BACKWARD), "cuda", {"copy": 2e6})
    assert line["wrong"] is None
    assert [round(line[f"{x}_us"], 6) for x in ("host", "eager_host", "cold", "graph")] == [30, 20, 100, 90]
    assert line["kernels_us"] == {"a_kernel": 80.0}
    assert (round(line["share"], 6), line["roof"]) == (0.5, "copy")


def test_without_a_profiler_the_rest_stands(monkeypatch):
    def profile(**_):
        raise RuntimeError("CUPTI is not here")

    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert smoke.kernels(lambda: None) == "no profiler: RuntimeError: CUPTI is not here"


# --- what the memory checkers watch -----------------------------------------------------------------------------------

SIZES = {"WIDTH", "EPS", "COLUMNS", "SEGMENT", "SCALE", "SHIFT", "BLOCK_N", "BLOCK_D", "BLOCK_K", "TILE", "GAMMA"}


def variants(launches):
    """Return (kernel, argument, what of its value makes another kernel), without sizes, which only scale a kernel."""
    found = set()
    for launch in launches:
        kernel = launch["kernel"]
        given = dict(zip((p.name for p in kernel.params), launch["args"], strict=False)) | launch["options"]
        for name, value in given.items():
            if value is None or isinstance(value, (bool, str)) or name in ("ACC", "OPERAND", "ROUND"):
                found.add((kernel.__name__, name, str(value)))
            elif isinstance(value, torch.Tensor) or name == "CLIP":
                found.add((kernel.__name__, name, "given"))
            elif name == "BLOCK" and kernel.__name__ == "cosine_rows_kernel":
                found.add((kernel.__name__, name, str(value)))
            elif name in ("ROWS", "PATCH"):
                found.add((kernel.__name__, name, "one" if value <= 1 else "several"))
    return found


@pytest.fixture
def compilable():
    aot = pytest.importorskip("aot")
    if aot.triton.knobs.runtime.interpret:
        pytest.skip("the interpreter has no launches to look at")
    return aot


def exercised(aot, monkeypatch, cases):
    monkeypatch.setattr("fused_dino.backend.triton_obstacle", lambda *_, **__: None)
    return aot.launches([SimpleNamespace(launch=call, name=name) for name, call in cases], "sm_90")


def test_every_variant_of_a_kernel_is_exercised(compilable, monkeypatch):
    """The exercise runs as many variants as are compiled ahead of time."""
    from aot_cases import CASES

    compiled = compilable.launches([case for cases in CASES for case in cases()], "sm_90")
    cases = exercise.cases("cpu")
    seen = variants(exercised(compilable, monkeypatch, cases))
    assert len(variants(compiled)) > 150
    assert variants(compiled) <= seen, variants(compiled) - seen
    for word in ("several rows", "split", "merged", "TF32", "large means", "channels last"):
        assert any(word in name for name, _ in cases), word
    fewer = [case for case in cases if "elements" not in case[0] and "an element" not in case[0]]
    assert not variants(compiled) <= variants(exercised(compilable, monkeypatch, fewer)), "one that is left out is seen"


def test_the_exercise_names_each_case_and_ends_in_time(compilable, monkeypatch, capsys):
    monkeypatch.setattr(exercise.session, "default_device", lambda: "cpu")
    names = [name for name, _ in exercise.cases("cpu")]
    assert len({*names}) == len(names)
    ran = []
    monkeypatch.setattr(
        exercise, "cases", lambda device: [(name, lambda name=name: ran.append(name)) for name in names]
    )
    monkeypatch.setattr(exercise.sys, "argv", ["exercise"])
    assert exercise.main() == 0
    assert ran == names
    assert capsys.readouterr().out.splitlines() == [*names, f"{len(names)} cases ran"]
    monkeypatch.setattr(exercise.sys, "argv", ["exercise", "--seconds", "-1"])
    assert exercise.main() == smoke.OUT_OF_TIME
    assert capsys.readouterr().out == f"out of time: {len(names)} of {len(names)} cases are left\n"
