"""`fused-dino bench` and `python -m benchmarks`: what they refuse before they measure, and what they print."""

import inspect
from pathlib import Path

import pytest
import torch

import copies
from benchmarks import __main__ as module
from fused_dino.benchmarks import command, harness, roofs, session
from fused_dino.benchmarks.shapes import Row
from fused_dino.cli import main

ROOT = Path(__file__).parents[1]
BENCH = command.bench


@pytest.fixture
def tiny(monkeypatch):
    """One op of one small row, which compiles nothing; nothing but it is measured."""
    bench = harness.Bench(
        op="cosine_loss",
        rows=(Row((3, 4), "small", quick=True),),
        inputs=lambda row, generator: (harness.normal(row.shape, row, generator),),
        recipe=lambda row: lambda x: x.square().mean(),
        ours=lambda row, backend: lambda x: x.square().mean(),
        work=lambda row, direction: (1.0, 1.0),
    )
    monkeypatch.setattr(harness, "benches", lambda: {"cosine_loss": bench})
    monkeypatch.setattr(harness, "compiled", lambda function, mode=None: function)
    monkeypatch.setattr(roofs, "measure_roofs", lambda device, precisions: {"copy": 1e10})


def refused(capsys, *argv):
    assert main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.fixture
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr(session, "run", lambda *_, **__: pytest.fail("it measured"))


@pytest.mark.usefixtures("nothing_is_measured")
class TestRefusals:
    def test_an_unknown_op_names_the_choices(self, capsys):
        says = refused(capsys, "--op", "softmax")
        assert "--op: 'softmax' is not measured; choose from cosine_loss" in says
        assert "step" in says

    def test_an_op_outside_the_quick_selection(self, capsys):
        assert "--quick: no row of step is in the quick selection" in refused(capsys, "--quick", "--op", "step")

    def test_a_file_in_place_of_a_folder(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        assert "--json: cannot write" in refused(capsys, "--json", str(tmp_path / "file/x.json"))

    def test_no_such_folder(self, capsys, tmp_path):
        assert "No such file" in refused(capsys, "--json", str(tmp_path / "nowhere/x.json"))

    def test_a_folder(self, capsys, tmp_path):
        assert "is a folder" in refused(capsys, "--json", str(tmp_path))

    def test_an_older_file_survives_the_refusal_of_another_argument(self, capsys, tmp_path):
        (tmp_path / "x.json").write_text("older")
        refused(capsys, "--op", "softmax", "--json", str(tmp_path / "x.json"))
        assert (tmp_path / "x.json").read_text() == "older"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, capsys):
        assert "--device: there is no GPU" in refused(capsys, "--device", "cuda")

    def test_a_row_that_is_not_there(self, capsys):
        assert "--row: no row that is to be measured has '7 x 7' in its name" in refused(capsys, "--row", "7 x 7")

    def test_the_module_refuses_as_well(self):
        run = copies.python("-m", "benchmarks", "run", "--op", "softmax", cwd=ROOT)
        assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
        assert "choose from cosine_loss" in run.stderr


@pytest.mark.usefixtures("tiny")
class TestRuns:
    def test_it_ends_in_a_sentence_and_says_that_this_is_a_cpu(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(session, "default_device", lambda: "cpu")
        assert main(["bench", "--quick", "--self-check", "--json", str(tmp_path / "x.json")]) == 0
        *_, noise, device, sentence, kept = capsys.readouterr().out.strip().splitlines()
        assert noise.startswith("Self-check: ")
        assert "a CPU" in device
        assert sentence.startswith("cosine_loss: ")
        assert kept == f"Evidence: {tmp_path / 'x.json'}"
        assert [path.name for path in tmp_path.iterdir()] == ["x.json"]

    def test_ctrl_c_ends_with_what_there_is(self, capsys, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(session, "record", interrupted)
        assert main(["bench"]) == 130
        assert "Measured 0 of 2: the run was ended early." in capsys.readouterr().out

    def test_each_row_is_named_before_it_is_measured(self, capsys):
        assert command.bench(quick=True) == 0
        out, err = capsys.readouterr()
        assert err == "measuring cosine_loss 3 x 4 float32 (IEEE), forward + backward\n"
        assert "cosine_loss: " in out


def test_the_command_loads_nothing_of_it_until_it_runs():
    code = "import sys, fused_dino.cli; print(sorted(x for x in sys.modules if 'benchmarks' in x))"
    run = copies.python("-c", code, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr


def test_both_names_of_the_command_call_one_function_with_the_same_arguments(monkeypatch):
    argv = ["--op", "step", "--row", "2", "--quick", "--device", "cpu", "--seconds", "9", "--json", "x", "--self-check"]
    calls = []
    for bench in (command, module.command):
        monkeypatch.setattr(bench, "bench", lambda **options: calls.append(options) or 0)
    assert main(["bench", *argv]) == module.main(["run", *argv]) == 0
    assert main(["bench"]) == module.main(["run"]) == 0
    assert calls[0] == calls[1] != calls[2] == calls[3]
    assert {*calls[0]} == {*inspect.signature(BENCH).parameters}
