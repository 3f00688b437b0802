"""`make gpu`, without a GPU: stages that fail, hang and crash cost their share, and a run that is killed leaves all."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, command, evidence, gpu, stages
from benchmarks.smoke import OUT_OF_TIME
from benchmarks.stages import Stage

ROOT = Path(__file__).parent.parent


def stage(name, code, seconds=0.5, **options):
    return Stage(name, [sys.executable, "-c", code], seconds, **options)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 0.5)


def test_each_end_of_a_stage(tmp_path):
    seen = []
    outcomes = stages.run_all(
        [
            stage("fails", "print('said'); exit(1)"),
            stage("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
            Stage("no-command", ["no-such-command-anywhere"], 0.5),
            Stage("no-tool", [], 0.5, missing="it is nowhere"),
            stage("ends-by-itself", f"exit({OUT_OF_TIME})"),
            stage("hangs", "import time; print('began', flush=True); time.sleep(60)", 2.0),
            stage("measures", "print('still measured')", 5.0, proves=False),
        ],
        tmp_path,
        seconds=9.5,
        ended=lambda outcomes: seen.append(len(outcomes)),
    )
    assert [outcome.status for outcome in outcomes] == [
        "failed", "crashed", "crashed", "not found", "out of time", "out of time", "passed",
    ]  # fmt: skip
    assert [outcome.bad for outcome in outcomes] == [True, True, True, False, True, True, False]
    assert outcomes[3].why == "it is nowhere"
    assert (tmp_path / "fails.log").read_text() == "said\n"
    assert (tmp_path / "hangs.log").read_text().startswith("began\n")
    assert (tmp_path / "measures.log").read_text() == "still measured\n"
    assert seen == [1, 2, 3, 4, 5, 6, 7], "told after each"


def limits(monkeypatch, tmp_path, planned, used, seconds):
    """Return the limit of each stage, if the stages use this much of theirs."""
    given, now = [], [0.0]

    def run_stage(stage, log, limit):
        given.append(limit)
        now[0] += used[stage.name]
        return stages.Outcome(stage, "passed", 0.0)

    monkeypatch.setattr(stages, "run_stage", run_stage)
    stages.run_all([stage(name, "", x) for name, x in planned.items()], tmp_path, seconds, clock=lambda: now[0])
    return given


def test_what_a_stage_does_not_use_is_left_to_later_ones(monkeypatch, tmp_path):
    planned = {"smoke": 150.0, "tests": 270.0, "checkers": 90.0, "benchmarks": 30.0}
    unused = dict.fromkeys(planned, 50.0)
    assert limits(monkeypatch, tmp_path, planned, planned, 540) == [150, 270, 90, 30]
    assert limits(monkeypatch, tmp_path, planned, unused, 540) == [150, 370, 410, 390]
    assert limits(monkeypatch, tmp_path, planned, {x: y / 2 for x, y in planned.items()}, 270) == [75, 135, 45, 15]
    assert limits(monkeypatch, tmp_path, {"smoke": 150.0}, planned, 540) == [540], "alone it has all of the time"


CHILD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
while True:
    open(sys.argv[1], "a").write("x")
    time.sleep(0.05)
"""


@pytest.mark.parametrize("leaves", ["and waits", "and ends"])
def test_a_stage_is_ended_with_its_children(tmp_path, leaves):
    """The child writes on as long as it lives, and asking it to end is not enough."""
    alive = tmp_path / "alive"
    start = "subprocess.run" if leaves == "and waits" else "subprocess.Popen"
    code = f"import subprocess, sys, time; {start}([sys.executable, '-c', {CHILD!r}, {str(alive)!r}]); time.sleep(0.5)"
    outcome = stages.run_stage(stage("stubborn", code), tmp_path / "log", limit=2.5)
    assert outcome.status == ("out of time" if leaves == "and waits" else "passed")
    assert outcome.seconds < 8
    time.sleep(0.3)
    size = os.path.getsize(alive)
    time.sleep(0.3)
    assert os.path.getsize(alive) == size > 0


def test_a_stage_that_can_end_by_itself_is_told_when(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "GRACE", 2.0)
    told = Stage("x", [sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"], 1.0)
    stages.run_stage(told, tmp_path / "log", limit=30.0)
    assert (tmp_path / "log").read_text() == "26\n"


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "sanitizer", lambda: "bin/compute-sanitizer")


@pytest.mark.usefixtures("a_gpu")
def test_the_stages_and_what_is_asked_for(tmp_path):
    found = gpu.chosen(tmp_path, "cuda", 540, [])
    assert [(stage.name, stage.seconds) for stage in found] == [
        ("smoke", 150), ("tests", 270), ("memcheck", 55), ("racecheck", 35), ("benchmarks", 30),
    ]  # fmt: skip
    assert [stage.proves for stage in found] == [True, True, True, True, False]
    assert str(tmp_path / "nvidia-h100-80gb-hbm3.json") in found[-1].command
    assert all("{seconds}" in stage.command for stage in found if stage.name != "tests")
    assert [stage.name for stage in gpu.chosen(tmp_path, "cuda", 540, ["checkers"])] == ["memcheck", "racecheck"]
    assert [stage.name for stage in gpu.chosen(tmp_path, "cuda", 540, ["wide", "smoke"])] == ["smoke", "wide"]


def test_the_sanitizer_is_looked_for_beside_nvcc_too(tmp_path, monkeypatch):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    tools = {folder: tmp_path / folder / "compute-sanitizer" for folder in ("path", "toolkit/bin", "cuda/bin")}
    for tool in (*tools.values(), tmp_path / "toolkit/bin/nvcc"):
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
    (tmp_path / "path/nvcc").symlink_to(tmp_path / "toolkit/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    for folder in ("path", "toolkit/bin", "cuda/bin"):
        assert gpu.sanitizer() == str(tools[folder])
        tools[folder].unlink()
    assert gpu.checker("memcheck", 1.0, "cpu").missing


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("broken", [False, True])
def test_the_status_tells_of_what_proves_something(tmp_path, monkeypatch, capsys, broken):
    found = [("tests", stage("tests", f"exit({int(broken)})")), ("x", stage("x", "exit(1)", proves=False))]
    monkeypatch.setattr(gpu, "stages", lambda out, device, seconds: found)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu.main([str(tmp_path / "out"), "--seconds", "20"]) == int(broken)
    assert (tmp_path / "out/summary.txt").read_text() in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "no GPU" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_command_of_the_page_is_understood(monkeypatch):
    """The commands are written down before a GPU is rented."""
    page = (ROOT / "docs/gpu.md").read_text()
    lines = [line.split()[2:] for line in map(str.strip, page.splitlines()) if line.startswith("python3 -m ")]
    runs = []
    monkeypatch.setattr(command, "bench", lambda **options: runs.append(options) or 0)
    for module, *argv in lines:
        if module == "benchmarks":
            assert __main__.main(argv) == 0
        else:
            assert module == "benchmarks.gpu"
            options = gpu.arguments().parse_args(argv)
            assert options.seconds < 600
    assert len(lines) >= 6
    assert {run["op"] for run in runs} == {None, "vicreg_loss", "step", "teacher"}


KILLED = """
import sys
from benchmarks import gpu, stages
from benchmarks.stages import Stage

code = "import time; print('began', flush=True); time.sleep(60)"
found = [("smoke", Stage("smoke", [sys.executable, "-c", "print('7 rows')"], 9.0)),
         ("tests", Stage("tests", [sys.executable, "-c", code], 60.0)),
         ("benchmarks", Stage("benchmarks", [sys.executable, "-c", "print('never')"], 9.0))]
gpu.stages = lambda *_: found
sys.exit(gpu.main([sys.argv[1], "--device", "cpu"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_killed_leaves_what_it_found(tmp_path, number):
    """This holds in the background, too, where a shell makes the run ignore Ctrl-C."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=ignore)
    log = out / "tests.log"
    while not (log.exists() and log.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    assert "smoke      passed" in (out / "summary.txt").read_text(), "written after each stage"
    run.send_signal(number)
    assert run.wait(timeout=30) == 1
    text = (out / "summary.txt").read_text()
    assert " 7 rows" in text
    assert "tests      interrupted" in text
    assert not (out / "benchmarks.log").exists()


def test_a_dry_run_goes_through_every_stage(tmp_path):
    """Each stage leaves its files, and the summary names each. CI makes the same run on a CPU."""
    out = tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", str(out), "--device", "cpu"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    text = (out / "summary.txt").read_text()
    assert run.returncode == 0, text + run.stderr
    assert text in run.stdout
    named = {line.split()[0]: line.split(maxsplit=1)[1] for line in text.splitlines()[1:6]}
    assert list(named) == ["smoke", "tests", "memcheck", "racecheck", "benchmarks"]
    assert "7 of 7 rows, 0 wrong, 0 whose bits differ" in named["smoke"]
    assert named["tests"].endswith(" 7 passed")
    assert named["memcheck"].startswith("not found")
    assert named["benchmarks"].endswith("1 rows (complete)")
    for op in ("cosine", "mse", "preprocess", "vicreg"):
        assert any(line.startswith(op) and line.endswith(" right") for line in text.splitlines())
    assert len([json.loads(line) for line in (out / "smoke.jsonl").read_text().splitlines()]) == 8
    assert len((out / "tests.jsonl").read_text().splitlines()) == 14, "each began, and ended"
    (record,) = evidence.load(out / "cpu.json").records
    assert record.of("ours") is not None
