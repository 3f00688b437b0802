"""The kernels meet their budgets on GPUs that are not here, and the check reports what breaks one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")
import aot
import aot_shared
import ptx

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
def double_kernel(x):
    tl.store(x, (tl.load(x).to(tl.float64) * 0.1).to(tl.float32))

@triton.jit
def strided_kernel(x, y):
    at = tl.arange(0, 128)
    tl.store(y + at, tl.gather(tl.load(x + tl.arange(0, 256)), at * 2, 0))

@triton.jit
def chain_kernel(x, steps):
    at = x + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for step in range(steps):
        acc = tl.dot(tl.load(at + step), tl.load(at), acc)
    tl.store(at, acc.to(tl.bfloat16))

@triton.jit
def idle_kernel(x):
    tl.store(x, 0)

x = torch.empty(128, 128)
CASES = [
    Case("fp32", lambda: spilling_kernel[(1,)](x, BLOCK=8192, num_warps=1)),
    Case("bf16", lambda: dot_kernel[(1,)](x.bfloat16(), WIDTH=64)),
    Case("fp32", lambda: copy_kernel[(1,)](x, x)),
    Case("fp32", lambda: broken_kernel[(1,)](x)),
    Case("fp32", lambda: double_kernel[(1,)](x)),
    Case("fp32", lambda: strided_kernel[(1,)](x, x), values=1),
    Case("bf16", lambda: chain_kernel[(1,)](x.bfloat16(), 9)),
]
"""
BUDGET = {"registers": 255, "shared": 65536, "load": 0, "store": 0}


def run(*command, **environment):
    """Run a process of its own: the environment of this one may ask for the interpreter."""
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**ENVIRONMENT, **environment}
    )


@pytest.fixture(scope="module")
def checked():
    """Check every case on sm_90, and some on other GPUs: `make aot` compiles them all."""
    return run(AOT, "--some")


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
            assert all({"HMMA", "HGMMA", "mfma"} & set(row) == {name} for row in rows), rows


def test_one_op_is_checked_alone():
    done = run(AOT, "--some", "--op", "standardize")
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = {line.split()[0] for line in done.stdout.splitlines()[1:-1]}
    assert {kernel.split("_")[0] for kernel in kernels} == {"standardize", "column"}
    assert done.stdout.splitlines()[-1].startswith(f"{len(kernels)} kernels ")


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
    budgets |= {f"{name}_kernel": BUDGET for name in ("idle", "gone", "broken", "double", "strided", "chain")}
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
        "chain_kernel, bf16, sm_80: chained 1, budget at most 0",
        "chain_kernel, bf16, sm_90: chained 1, budget at most 0",
        "double_kernel, fp32, sm_90: f64 3, budget at most 0",
        "double_kernel, fp32, gfx942: f64 3, budget at most 0",
        "strided_kernel, fp32, sm_90: conflicts 2, budget at most 0",
        "strided_kernel, fp32, sm_90: barriers 1, budget at most 0",
    ],
)
def test_a_failure_is_named(toy, line):
    assert toy.returncode == 1, toy.stderr
    assert any(found.startswith(line) for found in toy.stdout.splitlines()), toy.stdout


def test_a_kernel_without_a_budget_prints_one_to_copy(toy):
    """A kernel whose budget is broken prints one, too; other kernels do not."""
    lines = toy.stdout.partition("is just within:\n")[2].splitlines()[:-1]
    budgets = json.loads("{" + "\n".join(lines).rstrip(",") + "}")
    assert {"copy_kernel", "dot_kernel bf16", "spilling_kernel", "chain_kernel"} <= {*budgets}
    assert budgets["copy_kernel"].keys() == {"registers", "shared", "load", "store"}
    assert budgets["copy_kernel"]["store"] == 4
    assert "broken_kernel" not in budgets


@pytest.mark.parametrize(("target", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("gfx942", "mfma")])
def test_matrix_instructions_are_counted(toy, target, name):
    (row,) = (line.split() for line in toy.stdout.splitlines() if line.startswith("dot_kernel ") and target in line)
    count, kind = row[-10:-8]
    assert int(count) > 0
    assert kind == name


def test_a_plain_kernel_has_no_matrix_instructions(toy):
    rows = [line.split() for line in toy.stdout.splitlines() if line.startswith("copy_kernel ")]
    assert len(rows) == len(aot.TARGETS)
    assert {row[-9] for row in rows} == {"-"}


ROW = aot.Row("a_kernel", "bf16", "BLOCK=256", "sm_120", 64, 0, 0, 1024, 16, 16, "4 HMMA")
COUNTS = {"instructions": 40, "wavefronts": 95, "conflicts": 2, "barriers": 6}
LIMITS = {"registers": {"cuda": 64, "hip": 32}, "shared": 10**6, "load": 16, "store": 16, **COUNTS}


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
        ({"f64": 1}, "f64 1, budget at most 0"),
        ({"chained": 1}, "chained 1, budget at most 0"),
        ({"instructions": "40.1"}, "instructions 40.1, budget at most 40"),
        ({"wavefronts": "96"}, "wavefronts 96, budget at most 95"),
        ({"conflicts": "3"}, "conflicts 3, budget at most 2"),
        ({"barriers": "12"}, "barriers 12, budget at most 6"),
    ],
)
def test_every_limit_holds(change, words):
    row = replace(ROW, **change)
    assert list(aot.excesses(row, LIMITS)) == [f"{row}: {words}"]


def test_within_the_limits_nothing_is_wrong():
    assert list(aot.excesses(ROW, LIMITS)) == []
    assert list(aot.excesses(replace(ROW, matrix="0"), LIMITS | {"matrix": 0})) == []
    assert list(aot.excesses(replace(ROW, matrix="-"), LIMITS)) == []
    assert list(aot.excesses(replace(ROW, f64=9, chained=1, case="last fp64"), LIMITS)) == []
    assert list(aot.excesses(replace(ROW, f64=9), LIMITS | {"f64": 9})) == []
    counted = replace(ROW, instructions="40.0", wavefronts="95", conflicts="2", barriers="6")
    assert list(aot.excesses(counted, LIMITS)) == []


def test_the_budgets_that_are_printed_hold_and_are_tight():
    amd = replace(ROW, target="gfx942", registers=40, load=8, store=8, matrix="4 mfma")
    fp64 = replace(ROW, case="fp64", registers=128, matrix="0", f64=9)
    unaligned = replace(ROW, case="unaligned bf16", shared=0, load=2, f64=3)
    rows = [ROW, replace(ROW, **{name: str(value) for name, value in COUNTS.items()}), amd, fp64, unaligned]
    held = aot.budgets_of(rows, {})
    assert {name: len(those) for name, those in held.items()} == {
        "a_kernel": 3, "a_kernel fp64": 1, "a_kernel unaligned": 1,
    }  # fmt: skip
    written = "".join(aot.as_written(name, aot.reached(those)) for name, those in held.items())
    budgets = json.loads("{" + written.rstrip(",") + "}")
    assert not [line for name, those in held.items() for row in those for line in aot.excesses(row, budgets[name])]
    assert budgets == {
        "a_kernel": {
            "registers": {"cuda": 64, "hip": 40}, "shared": 1024, "load": {"cuda": 16, "hip": 8},
            "store": {"cuda": 16, "hip": 8}, **COUNTS,
        },
        "a_kernel fp64": {"registers": 128, "shared": 1024, "load": 16, "store": 16, "matrix": 0},
        "a_kernel unaligned": {"registers": 64, "shared": 0, "load": 2, "store": 16, "f64": 3},
    }  # fmt: skip


def test_a_compiler_has_limits_of_its_own():
    own = LIMITS | {aot.COMPILER: {"registers": {"cuda": 72, "hip": 32}}}
    assert list(aot.excesses(replace(ROW, registers=72), own)) == []
    assert list(aot.excesses(replace(ROW, registers=73), own)) == [f"{ROW}: registers 73, budget at most 72"]
    assert len(list(aot.excesses(replace(ROW, registers=72), LIMITS | {"0.1": own[aot.COMPILER]}))) == 1


def test_a_gpu_has_limits_of_its_own():
    own = LIMITS | {"registers": {"cuda": 64, "sm_80": 96, "hip": 32}}
    assert list(aot.excesses(replace(ROW, registers=96, target="sm_80"), own)) == []
    over = replace(ROW, registers=97, target="sm_80")
    assert list(aot.excesses(over, own)) == [f"{over}: registers 97, budget at most 96"]
    other = replace(ROW, registers=96)
    assert list(aot.excesses(other, own)) == [f"{other}: registers 96, budget at most 64"]


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


def strided(stores: int) -> str:
    """Return a kernel of 64 threads, each of which stores adjacent words and loads the first again."""
    store = "\n".join(f"    st.shared.b32 [ %r4 + {4 * i} ], %r2;" for i in range(stores))
    return f"""
.visible .entry strided_kernel(
    .param .u32 strided_kernel_param_0
)
.reqntid 64
{{
    .reg .b32 %r<6>;
    ld.param.b32 %r1, [strided_kernel_param_0];
    mov.u32 %r2, %tid.x;
    mul.lo.s32 %r3, %r1, %r2;
    shl.b32 %r4, %r3, 2;
{store}
    bar.sync 0;
    ld.shared.b32 %r5, [%r4];
    ret;
}}
"""


@pytest.mark.parametrize(("stride", "conflicts"), [(0, 1), (1, 1), (2, 2), (3, 1), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_of_a_stride(stride, conflicts):
    """Two warps store and load. An access takes one wavefront for each word in its busiest bank."""
    found = aot_shared.traffic(
        strided(1), "STS [R1], R2 ; BAR.SYNC.DEFER_BLOCKING 0x0 ; LDS R3, [R1] ;", 64, [stride], 1
    )
    assert found == (2 * 2 * conflicts, conflicts, 1)


def test_stores_side_by_side_are_one_as_in_the_machine_code():
    """Accesses of sixteen bytes are served for eight lanes at a time, without a conflict."""
    joined = "STS.128 [R1], R4 ; BAR.SYNC.DEFER_BLOCKING 0x0 ; LDS R3, [R1] ;"
    assert aot_shared.traffic(strided(4), joined, 64, [4], 1) == (2 * 4 + 2 * 4, 4, 1)
    with pytest.raises(ValueError, match="STS.128"):
        aot_shared.traffic(strided(4), joined.replace("STS.128", "STS.64"), 64, [4], 1)


def test_an_unknown_instruction_is_named():
    with pytest.raises(NotImplementedError, match="shfl"):
        ptx.run(strided(1).replace("bar.sync 0", "shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1"), 64, [1])


RUN = """
import numpy as np, torch
import aot, ptx
from aot_cases import resize_cases
from fused_dino import functional as FD
from triton.runtime import driver

(case,) = (case for case in resize_cases() if case.name == "fp32 bilinear")
(launch,) = aot.launches([case], "sm_90")
driver.set_active(aot.Elsewhere(aot.TARGETS["sm_90"][0]))
compiled = launch["kernel"].run(*launch["args"], grid=(1,), warmup=True, **launch["options"])
arguments, images = aot.arguments(launch, compiled), torch.rand(1, 3, 256, 256)
memory = np.concatenate([images.numpy().ravel(), np.zeros(3 * 224 * 224, "f4")])
arguments[1] = images.nbytes
for program in range(224 // 8):
    ptx.run(compiled.asm["ptx"], 64, arguments, (program, 0), memory.view("u1"))
out = torch.from_numpy(memory[images.numel() :]).view(1, 3, 224, 224)
print((out - FD.preprocess(images, 224, input_range=(-1, 1), backend="reference")).abs().max().item())
"""


def test_the_compiled_kernel_that_is_counted_computes_the_op():
    paths = [str(AOT.parent), str(AOT.parent.parent)]
    done = run("-c", f"import sys; sys.path[:0] = {paths}\n{RUN}")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5, done.stdout  # values of up to some units, each of a few roundings
