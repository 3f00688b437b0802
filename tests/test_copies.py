"""A copy of the process that has imported torch is what a new process would be."""

import pytest

import copies
from test_distributed import spawn


def test_it_has_its_own_arguments_folder_environment_and_main(tmp_path):
    (tmp_path / "fused_dino.py").write_text("import os, sys\nprint(__name__, sys.argv[1:], os.environ['WORD'])\n")
    (tmp_path / "copies.py").write_text("")
    for how in (("-c", "import fused_dino"), ("-m", "fused_dino")):
        run = copies.python(*how, "one", "two words", cwd=tmp_path, WORD="said")
        name = "__main__" if how[0] == "-m" else "fused_dino"
        assert (run.returncode, run.stdout, run.stderr) == (0, f"{name} ['one', 'two words'] said\n", "")
    code = "import os, __main__; __main__.x = 1; print(__name__, x, 'WORD' in os.environ, os.read(0, 1))"
    assert copies.python("-c", code, cwd=tmp_path).stdout == "__main__ 1 False b''\n"
    assert "NameError" in copies.python("-c", "print(x)", cwd=tmp_path).stderr, "one leaves nothing to the next"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [("raise SystemExit(3)", 3, ""), ("1 / 0", 1, "ZeroDivisionError"), ("import os; os.abort()", -6, "")],
)
def test_its_end_is_told(code, status, said, tmp_path):
    run = copies.python("-c", f"import sys; print('begun', flush=True); {code}", cwd=tmp_path)
    assert (run.returncode, run.stdout) == (status, "begun\n")
    assert said in run.stderr


def the_second_fails(rank, world):
    assert rank != 1, "the second of three"


def test_a_rank_that_fails_is_told_of(tmp_path):
    with pytest.raises(AssertionError, match="the second of three"):
        spawn(the_second_fails, 3, tmp_path)
