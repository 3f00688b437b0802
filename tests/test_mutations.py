"""The proving ground proves something: kernels broken on purpose are each caught, by the test that is there for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

# What is broken: the kernel's line, what becomes of it, and the test that catches it.
MUTATIONS = {
    "a mask": (
        "return tl.load(row + column, mask=column < WIDTH, other=0).to(ACC)",
        "return tl.load(row + column).to(ACC)",
        "test_kernels.py::test_nothing_out_of_bounds_is_touched",
    ),
    "a stride": ("teacher + row * stride_teacher", "teacher + row * stride_student", "test_ops.py::test_layouts"),
    "an eps": (
        "s_along = tl.where(s_norm < eps, 0, cos)",
        "s_along = tl.where(s_norm < 0, 0, cos)",
        "test_ops.py::test_is_as_accurate_as_eager -k eps",
    ),
    "a dtype": (
        "s = load_row(s_row, start, WIDTH, BLOCK, ACC)\n",
        "s = load_row(s_row, start, WIDTH, BLOCK, ACC).to(tl.bfloat16).to(ACC)\n",
        "test_ops.py::test_is_as_accurate_as_eager",
    ),
    "a missing row": (
        "tl.store(loss + row, scale * distance)",
        "tl.store(loss + row, scale * distance, mask=row != 2)",
        "test_kernels.py::test_every_element_is_written",
    ),
    "a ticket that is not given back": (
        "tl.store(ticket, 0)",
        "tl.store(ticket, 1)",
        "test_kernels.py::test_a_ticket_is_left_zero",
    ),
    "a gradient without its scale": (
        "scale *= tl.load(grad_output + row * stride_grad_row).to(ACC)",
        "scale *= 1",
        "test_ops.py::test_is_as_accurate_as_eager",
    ),
    "an offset of 32 bits": (
        "first = program.to(tl.int64) * ROWS",
        "first = program * ROWS",
        "test_kernels.py::test_offsets_past_two_to_the_31st",
    ),
}


def prove(tree: Path, test: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *f"tests/{test}".split()]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment)


@pytest.fixture
def tree(tmp_path):
    for name in ("fused_dino", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_caught(name, tree):
    right, wrong, test = MUTATIONS[name]
    kernel = tree / "kernels/cosine.py"
    source = kernel.read_text()
    assert right in source
    kernel.write_text(source.replace(right, wrong))
    done = prove(tree, test)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout, done.stdout


def test_the_kernel_as_it_is_passes_them(tree):
    done = prove(tree, "test_kernels.py::test_every_element_is_written")
    assert done.returncode == 0, done.stdout + done.stderr
