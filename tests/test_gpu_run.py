"""`make gpu`, without a GPU: stages that fail, hang and crash cost their share, and the summary fits a screen."""

import os
import sys
import time

import pytest
import torch

from benchmarks import evidence, exercise, gpu
from benchmarks.evidence import Evidence, Record, Timing
from benchmarks.gpu import Outcome, Stage


def stage(name, code, share=0.5, **options):
    return Stage(name, [sys.executable, "-c", code], share, **options)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)


def test_each_end_of_a_stage(tmp_path):
    outcomes = gpu.run_all(
        [
            stage("tests", "print('FAILED tests/test_x.py::test_y - boom'); print('3 failed, 2 passed'); exit(1)"),
            stage("memcheck", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
            Stage("racecheck", ["no-such-command-anywhere"], 0.5),
            stage("hangs", "import time; print('began', flush=True); time.sleep(60)", 0.1),
            stage("benchmarks", "print('still measured')", proves=False),
        ],
        tmp_path,
        seconds=20,
    )
    assert [outcome.status for outcome in outcomes] == ["failed", "crashed", "crashed", "out of time", "passed"]
    assert [outcome.bad for outcome in outcomes] == [True, True, True, True, False]
    assert outcomes[0].said == "3 failed, 2 passed"
    assert outcomes[3].seconds < 10
    assert (tmp_path / "benchmarks.log").read_text() == "still measured\n"
    assert gpu.failures(tmp_path) == ["FAILED tests/test_x.py::test_y - boom"]


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    open(sys.argv[1], "a").write("x")
    time.sleep(0.05)
"""


def test_a_stage_that_ignores_the_end_is_ended_with_its_children(tmp_path):
    """The child writes on as long as it lives."""
    alive = tmp_path / "alive"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {CHILD!r}, {str(alive)!r}])"
    outcome = gpu.run_stage(stage("stubborn", code), tmp_path / "log", limit=1.5)
    assert outcome.status == "out of time"
    time.sleep(0.3)
    size = os.path.getsize(alive)
    time.sleep(0.3)
    assert os.path.getsize(alive) == size > 0


def test_a_stage_that_can_end_by_itself_is_told_when(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    told = Stage("x", [sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"], 1.0)
    gpu.run_stage(told, tmp_path / "log", limit=30.0)
    assert (tmp_path / "log").read_text() == "26\n"


def test_the_stages_end_with_the_benchmarks_and_keep_their_evidence_beside_the_logs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"bin/{name}")
    found = gpu.stages(tmp_path, "NVIDIA H100 80GB HBM3")
    assert [stage.name for stage in found] == ["tests", "memcheck", "racecheck", "benchmarks"]
    assert str(tmp_path / "nvidia-h100-80gb-hbm3.json") in found[-1].command
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert [stage.name for stage in gpu.stages(tmp_path, "x")] == ["tests", "benchmarks"]


def evidence_file(path, ops):
    timings = [
        Timing("eager", "eager", rounds=[{"cold": 3e-3}]),
        Timing("torch.compile", "compile", rounds=[{"cold": 2e-3}]),
        Timing("fused_dino triton", "ours", rounds=[{"cold": 1e-3}]),
    ]
    row = ("65536 x 1024 bfloat16", [65536, 1024], "bfloat16", "bf16", "why", "forward + backward", "cuda", 4e8, 1e9)
    records = [Record(op, *row, timings, True) for op in ops]
    device = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    evidence.save(Evidence(device, {}, None, "now", False, {"copy": 1e12}, records, "out of time"), path)


@pytest.mark.parametrize("failed", [0, 3, 500])
def test_the_summary_fits_a_screen(tmp_path, failed):
    lines = [f"FAILED tests/test_ops.py::test_is_as_accurate_as_eager[{i}-{'x' * 90}]" for i in range(failed)]
    (tmp_path / "tests.log").write_text("\n".join([*lines, f"{failed} failed, 900 passed in 200s"]))
    ops = ["cosine_loss", "preprocess", "mse_loss", "vicreg_loss", "step"]
    evidence_file(gpu.results_file(tmp_path, "NVIDIA H100"), ops)
    ends = {
        "tests": "failed" if failed else "passed",
        "memcheck": "passed",
        "racecheck": "passed",
        "benchmarks": "passed",
    }
    found = [Outcome(stage(name, ""), status, 99.0, "y" * 200) for name, status in ends.items()]
    text = gpu.summary(found, tmp_path, "NVIDIA H100")
    assert len(text.splitlines()) < gpu.HEIGHT
    assert max(map(len, text.splitlines())) <= gpu.WIDTH
    assert text.startswith("NVIDIA H100: " + ("FAILED" if failed else "passed"))
    assert "5 rows measured (out of time), in nvidia-h100.json" in text
    assert text.count("3.0x faster than eager, 2.0x faster than torch.compile, 40% of the copy roof") == len(ops)
    assert all(f"{op}: 65536" in text for op in ops)
    assert ("FAILED tests/test_ops.py" in text) == bool(failed)
    assert ("more, in tests.log" in text) == (failed > 100)


def test_evidence_that_is_missing_or_cut_short_is_said(tmp_path):
    path = gpu.results_file(tmp_path, "x")
    assert gpu.claims(path) == ["no row was measured"]
    path.write_text('{"schema"')
    assert "no results file" in gpu.claims(path)[0]


@pytest.mark.parametrize("broken", [False, True])
def test_the_status_tells_of_the_tests_alone(tmp_path, monkeypatch, capsys, broken):
    found = [stage("tests", f"exit({int(broken)})"), stage("benchmarks", "exit(1)", proves=False)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "stages", lambda out, device: found)
    assert gpu.main([str(tmp_path / "out"), "--seconds", "20"]) == int(broken)
    assert (tmp_path / "out/summary.txt").read_text() in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "no GPU" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_the_memory_checkers_watch_runs(capsys):
    exercise.main()
    out = capsys.readouterr().out
    assert "cosine_loss 64 x 1000" in out
    assert ": ran" in out
