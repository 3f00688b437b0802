"""The proving ground proves something: kernels broken on purpose are each caught, by the test that is there for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent

# What is broken: the kernel's file, its line, what becomes of it, and the test that catches it.
MUTATIONS = {
    "a mask": (
        "cosine",
        "t = tl.load(teacher + start + column, mask=live, other=0).to(ACC)\n        ss",
        "t = tl.load(teacher + start + column).to(ACC)\n        ss",
        "test_kernels.py::test_nothing_out_of_bounds_is_touched",
    ),
    "a stride": (
        "cosine",
        "teacher += row * stride_teacher",
        "teacher += row * stride_student",
        "test_ops.py::test_layouts",
    ),
    "an eps": (
        "cosine",
        "s_along = tl.where(s_norm < eps, 0, cos)",
        "s_along = tl.where(s_norm < 0, 0, cos)",
        "test_ops.py::test_is_as_accurate_as_eager -k eps",
    ),
    "a dtype": (
        "cosine",
        "s = tl.load(student + start + column, mask=live, other=0).to(ACC)\n",
        "s = tl.load(student + start + column, mask=live, other=0).to(tl.bfloat16).to(ACC)\n",
        "test_ops.py::test_is_as_accurate_as_eager",
    ),
    "a missing row": (
        "cosine",
        "tl.store(distance + row, 1 - tl.sum(st, 0))",
        "tl.store(distance + row, 1 - tl.sum(st, 0), mask=row != 2)",
        "test_kernels.py::test_every_element_is_written",
    ),
    "an offset of 32 bits": (
        "cosine",
        "row = tl.program_id(0).to(tl.int64)",
        "row = tl.program_id(0)",
        "test_kernels.py::test_offsets_past_two_to_the_31st",
    ),
    "a tile counted once": (
        "vicreg",
        "tl.where(i == j, square, 2 * square)",
        "square",
        "test_ops.py::test_is_as_accurate_as_eager -k 70x150",
    ),
    "a mirror image": (
        "vicreg",
        "tl.trans(value), mask=tl.trans(live) & (i != j)",
        "tl.trans(value), mask=tl.trans(live) & (i == j)",
        "test_kernels.py::test_every_element_is_written",
    ),
    "a split left out": (
        "vicreg",
        "for split in range(splits):\n        at = (",
        "for split in range(1, splits):\n        at = (",
        "test_ops.py::test_is_as_accurate_as_eager -k 20x1100",
    ),
    "a merge without its step": (
        "vicreg",
        "square += tl.load(squares + at, mask=inside, other=0) + step * (step * (before * here / (before + here)))",
        "square += tl.load(squares + at, mask=inside, other=0)",
        "test_ops.py::test_is_as_accurate_as_eager -k 1100x20",
    ),
    "means that come off after the product whatever they are": (
        "vicreg",
        "return tl.sum(excess, 0) > 0",
        "return tl.sum(excess, 0) > 1e30",
        "test_vicreg.py::test_numbers_hold_where_little_is_left",
    ),
    "a mean without the first row taken off": (
        "vicreg",
        "return tl.where(live, y - pivot - tl.load(shift + column, mask=live, other=0), 0)",
        "return tl.where(live, y - (pivot + tl.load(shift + column, mask=live, other=0)), 0)",
        "test_vicreg.py::test_numbers_hold_where_little_is_left -k float32",
    ),
    "a hinge at the wrong deviation": (
        "vicreg",
        "coefficient -= tl.where(sigma < tl.full((), GAMMA, ACC), pull, 0) / sigma",
        "coefficient -= pull / sigma",
        "test_ops.py::test_is_as_accurate_as_eager -k vicreg",
    ),
    "a product past its rows": (
        "vicreg",
        "live_y = (k < rows)[:, None] & inside[None, :]",
        "live_y = (k < rows + 1)[:, None] & inside[None, :]",
        "test_kernels.py::test_nothing_out_of_bounds_is_touched -k vicreg",
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
    stem, right, wrong, test = MUTATIONS[name]
    kernel = tree / f"kernels/{stem}.py"
    source = kernel.read_text()
    assert right in source
    kernel.write_text(source.replace(right, wrong))
    done = prove(tree, test)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout, done.stdout


def test_the_kernel_as_it_is_passes_them(tree):
    done = prove(tree, "test_kernels.py::test_every_element_is_written")
    assert done.returncode == 0, done.stdout + done.stderr
