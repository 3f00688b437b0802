"""docs/adding-an-op.md adds an op in five files. The op then has the proofs of every other."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import copies
from proving import Op

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/adding-an-op.md").read_text()
BLOCKS = re.findall(r"```py\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with the page's code: new files, and lines at the end of existing ones."""
    for name in ("fused_dino", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in BLOCKS:
        with (tmp_path / name).open("a") as file:
            file.write(f"\n\n{code}")
    return tmp_path


def python(tree, *arguments):
    return copies.python(*arguments, cwd=tree, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def test_five_files():
    assert len({name for name, _ in BLOCKS}) == len(BLOCKS) == 5


def test_its_commands_name_files_that_are_there():
    named = re.findall(r"tests/\w+\.py", COMMANDS)
    assert "tests/aot.py" in named
    assert all((ROOT / name).exists() for name in named), named


def test_a_row_need_not_say_that_a_kernel_takes_its_inputs():
    row = Op("copy", run=torch.clone, cases=(), scales=torch.abs)
    for inputs in ((1,), (1, 2)):
        assert row.forward_arguments(*inputs) == row.backward_arguments(*inputs) == inputs


def test_the_op_is_proven_like_every_other(tree):
    """The page's command runs more tests; these are some of them."""
    files = re.search(r"^\S+ (.*) -k smooth_l1$", COMMANDS, re.MULTILINE)[1].split()
    proofs = "accurate or mixed or derivatives or functional or autocast or aot_eager or no_rows or checkpointing"
    chosen = (*files, "-k", f"smooth_l1 and ({proofs} or tangent or any_shape or cpu or kernel)")
    run = python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 40, run.stdout


def test_a_wrong_closed_form_is_caught(tree):
    file = tree / "fused_dino/ops/smooth_l1.py"
    source = file.read_text()
    assert ".clamp_(-1, 1)" in source
    file.write_text(source.replace(".clamp_(-1, 1)", ""))
    run = python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_ops.py", "-k", "smooth_l1")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed" in run.stdout


def test_it_is_refused_on_triton_by_name_and_listed(tree):
    code = """
import torch, fused_dino
from fused_dino import functional as FD
x = torch.ones(2, 3)
print(fused_dino.explain_backend("smooth_l1_loss", x))
try:
    FD.smooth_l1_loss(x, x, backend="triton")
except NotImplementedError as error:
    print(error)
"""
    torch_line, refusal = python(tree, "-c", code).stdout.splitlines()
    assert torch_line.startswith("torch: ")
    assert refusal.startswith("smooth_l1_loss has no Triton kernel yet")
    assert "smooth_l1_loss on cpu" in python(tree, "-m", "fused_dino", "doctor").stdout
