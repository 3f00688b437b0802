"""The kernels are within their budgets on GPUs that are not here, and the check of it sees what it is there to see."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
import aot

AOT = Path(aot.__file__)
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

TOY = """
import torch, triton
import triton.language as tl
from aot_cases import Case

@triton.jit
def spilling_kernel(x, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    values = tl.load(at)
    tl.store(at, values / tl.sum(values))

@triton.jit
def dot_kernel(x, WIDTH: tl.constexpr):
    at = x + tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)
    tl.store(at, tl.dot(tl.load(at), tl.load(at)).to(tl.bfloat16))

@triton.jit
def copy_kernel(x, y):
    tl.store(y, tl.load(x))

@triton.jit
def broken_kernel(x):
    tl.store(x, undefined)

@triton.jit
def idle_kernel(x):
    tl.store(x, 0)

x = torch.empty(128, 128)
CASES = [
    Case("fp32", lambda: spilling_kernel[(1,)](x, BLOCK=8192, num_warps=1)),
    Case("bf16", lambda: dot_kernel[(1,)](x.bfloat16(), WIDTH=64)),
    Case("fp32", lambda: copy_kernel[(1,)](x, x)),
    Case("fp32", lambda: broken_kernel[(1,)](x)),
]
"""
BUDGET = {"registers": 255, "shared": 65536, "load": 0, "store": 0}


def run(*command, **environment):
    """A process of its own: the environment of this one may ask for the interpreter."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**ENVIRONMENT, **environment}
    )


@pytest.fixture(scope="module")
def checked():
    return run(AOT)


def test_every_kernel_is_within_its_budget(checked):
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.splitlines()[-1].endswith(" s.")


@pytest.mark.parametrize(("target", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "mfma")])
def test_products_run_in_matrix_instructions(checked, target, name):
    for kernel in ("vicreg_product_kernel", "vicreg_bwd_kernel"):
        for dtype in ("bf16", "fp16", "fp32"):
            rows = [line.split() for line in checked.stdout.splitlines() if line.split()[:2] == [kernel, dtype]]
            rows = [row for row in rows if target in row]
            assert rows, (kernel, dtype)
            assert {row[-1] for row in rows} == {name}


def test_the_interpreter_is_refused_in_one_line():
    done = run(AOT, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "TRITON_INTERPRET" in done.stderr


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.py").write_text(TOY)
    budgets = {"spilling_kernel": BUDGET, "dot_kernel bf16": BUDGET | {"registers": 8}, "dot_kernel": BUDGET}
    budgets |= {"idle_kernel": BUDGET, "gone_kernel": BUDGET, "broken_kernel": BUDGET}
    paths = [str(folder), str(AOT.parent), str(AOT.parent.parent)]
    code = f"import sys; sys.path[:0] = {paths}; import aot, toy; sys.exit(aot.check([toy], toy.CASES, {budgets}))"
    return run("-c", code)


@pytest.mark.parametrize(
    "line",
    [
        "copy_kernel: has no budget",
        "idle_kernel: no case launches it",
        "gone_kernel: has a budget, and is no kernel or case",
        "dot_kernel, bf16 WIDTH=64, sm_90: registers ",
        "spilling_kernel, fp32 BLOCK=8192 num_warps=1, sm_90: spills ",
        "spilling_kernel, fp32 BLOCK=8192 num_warps=1, sm_90: stack ",
        "broken_kernel, fp32, sm_90: does not compile: ",
    ],
)
def test_a_failure_is_named(toy, line):
    assert toy.returncode == 1, toy.stderr
    assert any(found.startswith(line) for found in toy.stdout.splitlines()), toy.stdout


@pytest.mark.parametrize(("target", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "mfma")])
def test_matrix_instructions_are_counted(toy, target, name):
    (row,) = (line.split() for line in toy.stdout.splitlines() if line.startswith("dot_kernel ") and target in line)
    count, kind = row[-3:-1]
    assert int(count) > 0
    assert kind == name


def test_a_plain_kernel_has_no_matrix_instructions(toy):
    rows = [line.split() for line in toy.stdout.splitlines() if line.startswith("copy_kernel ")]
    assert len(rows) == len(aot.TARGETS)
    assert {row[-2] for row in rows} == {"-"}


ROW = aot.Row("a_kernel", "bf16", "BLOCK=256", "sm_120", 64, 0, 0, 1024, 16, 16, "4 HMMA")
LIMITS = {"registers": {"cuda": 64, "hip": 32}, "shared": 10**6, "load": 16, "store": 16, "instructions": 40}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 65}, "registers 65, budget at most 64"),
        ({"registers": 33, "target": "gfx942"}, "registers 33, budget at most 32"),
        ({"spills": 4}, "spills 4, budget at most 0"),
        ({"stack": 8}, "stack 8, budget at most 0"),
        ({"shared": 100 * 1024}, "shared 102400, budget at most 101376"),
        ({"load": 8}, "load 8, budget at least 16"),
        ({"store": 4}, "store 4, budget at least 16"),
        ({"matrix": "0"}, "matrix 0, budget at least 1"),
        ({"instructions": "40.1"}, "instructions 40.1 a value, budget at most 40"),
    ],
)
def test_every_limit_holds(change, words):
    row = replace(ROW, **change)
    assert list(aot.excesses(row, LIMITS)) == [f"{row}: {words}"]


def test_within_the_limits_nothing_is_wrong():
    assert list(aot.excesses(ROW, LIMITS)) == []
    assert list(aot.excesses(replace(ROW, matrix="0"), LIMITS | {"matrix": 0})) == []
    assert list(aot.excesses(replace(ROW, matrix="-"), LIMITS)) == []
    assert list(aot.excesses(replace(ROW, instructions="40.0"), LIMITS)) == []


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                /* 0x00000a0000017a02 */
        /*0010*/                   MOV R2, RZ ;
        /*0020*/                   LDG.E R0, [R2] ;
        /*0030*/                   FADD R4, R4, R0 ;
        /*0040*/               @P1 BRA 0x30 ;
        /*0050*/                   STG.E [R2], R4 ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   NOP;
"""


def test_instructions_are_those_of_the_outermost_loop_and_what_is_around_it():
    assert aot.instructions(SASS, values=2, turns=10) == (3 + 10 * 5) / 20
    assert aot.instructions("/*0000*/ MOV R1, R2 ; /*0010*/ EXIT ; /*0020*/ BRA 0x20;", values=1, turns=1) == 2
