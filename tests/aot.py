"""Compile every kernel for GPUs that need not be here, and hold its machine code to the budgets in aot_budgets.json.

    python tests/aot.py            (without TRITON_INTERPRET)

A budget holds for a kernel or, as "<kernel> <first word of the case>", for some of its cases: at most so many
`registers` and bytes of `shared` memory, and a widest `load` and `store` of at least so many bytes a thread; each is a
number, or one for every backend. Nothing may spill or use a stack. A kernel with dots must have matrix instructions,
unless its budget says "matrix": 0. A case that says how many `values` one thread makes in a turn of its outermost loop,
and how many `turns` that loop takes, has its instructions counted in the machine code of sm_90, against a budget of at
most so many `instructions` a value.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parent.parent
# With the KiB of shared memory that a block can have there: past them a kernel compiles, and its launch fails.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
JOBS: list[tuple[dict[str, Any], str]] = []  # a launch and its target; global, so that workers inherit it


@dataclass
class Row:
    kernel: str
    case: str
    options: str
    target: str
    registers: int = 0
    spills: int = 0  # bytes, as stack and shared
    stack: int = 0
    shared: int = 0
    load: int = 0  # bytes of a thread's widest
    store: int = 0
    matrix: str = "-"  # how many matrix instructions, and which; - without a dot
    instructions: str = "-"  # a value, on sm_90; - where the case does not say how many values there are
    error: str = ""  # why it does not compile

    def __str__(self) -> str:
        return f"{self.kernel}, {self.case} {self.options}".rstrip() + f", {self.target}"


class Elsewhere:
    """As much of a Triton driver as compiling takes, for a GPU that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        # Triton keeps what it knows of a target by its device, so that every target must be a device of its own.
        self.get_current_target = self.get_current_device = lambda: target
        self.get_current_stream = lambda device: 0


def launches(cases: Iterable, backend: str) -> list[dict[str, Any]]:
    """What the cases launch where torch is built for a vendor's GPUs: a launcher may choose by it."""
    seen = []
    for case in cases:

        def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, case: Any = case, **options: Any) -> None:
            seen.append({"kernel": kernel, "args": args, "options": options, "case": case})

        vendor = mock.patch.object(torch.version, "hip", "any" if backend == "hip" else None)
        with mock.patch.object(JITFunction, "run", record), vendor:
            case.launch()
    return seen


def dump(asm: dict[str, Any], option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str, values: float, turns: int) -> float:
    """Executed by one thread for each of its values: all but the outermost loop once, that loop `turns` times.

    A loop inside of it counts once; a case with such a loop must be one where it takes a single turn.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    code = {at: text for at, text in lines if not text.startswith("NOP") and text.split()[-1] != f"{at:#x}"}
    jumps = [(int(to, 16), at) for at, text in code.items() for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)]
    start, end = max(((to, at) for to, at in jumps if to < at), key=lambda jump: jump[1] - jump[0], default=(0, -1))
    loop = sum(start <= at <= end for at in code)
    return (len(code) - loop + loop * turns) / (values * turns)


def cuda_resources(asm: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, int]], list[str]]:
    """Registers, spills and stack; the bytes of each load and store; the matrix instructions."""
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", dump(asm, "--dump-resource-usage"))}
    stack = used["STACK"] + used["LOCAL"]
    sass = dump(asm, "-sass") if stack or "tt.dot" in asm["ttir"] else ""  # takes longer than all the rest
    spills = sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.[US]?(\d+))?", sass))
    vectors = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s", asm["ptx"])
    moves = [(kind, int(count or 1) * int(bits) // 8) for kind, count, bits in vectors]
    moves += [("ld", int(size, 0)) for size in re.findall(r"\bcp\.async\.c[ag]\..*?\], *\[.*?\], (\w+)", asm["ptx"])]
    return {"registers": used["REG"], "spills": spills, "stack": stack}, moves, re.findall(r"\b[A-Z]+MMA\b", sass)


def hip_resources(asm: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, int]], list[str]]:
    code = asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    spills = 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"])
    unit = {"dword": 4, "short": 2, "byte": 1}
    move = r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(dword|short|byte)(?:x(\d))?"
    moves = [(kind, int(count or 1) * unit[name]) for kind, name, count in re.findall(move, code)]
    resources = {"registers": used["vgpr_count"], "spills": spills, "stack": used["private_segment_fixed_size"]}
    return resources, moves, re.findall(r"\bv_(mfma)_", code)


def compile_job(index: int) -> Row:
    launch, target = JOBS[index]
    gpu, _ = TARGETS[target]
    driver.set_active(Elsewhere(gpu))
    options = " ".join(f"{name}={value}" for name, value in launch["options"].items())
    row = Row(launch["kernel"].__name__, launch["case"].name, options, target)
    try:
        compiled = launch["kernel"].run(*launch["args"], grid=(1,), warmup=True, **launch["options"])
    except Exception as error:
        return replace(row, error=str(error))
    used, moves, matrix = (cuda_resources if gpu.backend == "cuda" else hip_resources)(compiled.asm)
    dots = " ".join([str(len(matrix)), *sorted(set(matrix))]) if "tt.dot" in compiled.asm["ttir"] else "-"
    load, store = (max((size for kind, size in moves if kind[0] == first), default=0) for first in "ls")
    row = replace(row, **used, shared=compiled.metadata.shared, load=load, store=store, matrix=dots)
    if launch["case"].values and target == "sm_90":
        count = instructions(dump(compiled.asm, "-sass"), launch["case"].values, launch["case"].turns)
        row = replace(row, instructions=f"{count:.1f}")
    return row


def table(rows: list[Row]) -> str:
    names = [field.name for field in fields(Row) if field.name != "error"]
    cells = [names, *([str(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def excesses(row: Row, budget: dict[str, Any]) -> Iterator[str]:
    """How a row breaks its budget."""
    gpu, kib = TARGETS[row.target]
    budget = {key: value[gpu.backend] if isinstance(value, dict) else value for key, value in budget.items()}
    most = {"registers": budget["registers"], "spills": 0, "stack": 0, "shared": min(budget["shared"], kib * 1024)}
    least = {"load": budget["load"], "store": budget["store"], "matrix": budget.get("matrix", 1)}
    for name, limit in most.items():
        if getattr(row, name) > limit:
            yield f"{row}: {name} {getattr(row, name)}, budget at most {limit}"
    if "instructions" in budget and row.instructions != "-" and float(row.instructions) > budget["instructions"]:
        yield f"{row}: instructions {row.instructions} a value, budget at most {budget['instructions']}"
    for name, limit in least.items():
        found = str(getattr(row, name)).split()[0]
        if found != "-" and int(found) < limit:
            yield f"{row}: {name} {getattr(row, name)}, budget at least {limit}"


def check(modules: Iterable[ModuleType], cases: Iterable, budgets: dict[str, Any]) -> int:
    """Compile what the cases launch, print the table and everything wrong; the exit status."""
    start = time.perf_counter()
    cases = list(cases)
    seen = {backend: launches(cases, backend) for backend in ("cuda", "hip")}
    JOBS[:] = [(launch, target) for target, (gpu, _) in TARGETS.items() for launch in seen[gpu.backend]]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool:
        rows = sorted(pool.map(compile_job, range(len(JOBS))), key=lambda row: row.kernel)
    print(table([row for row in rows if not row.error]))

    there = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    launched = {launch["kernel"].__name__ for launch, _ in JOBS}
    special = {f"{row.kernel} {row.case.split()[0]}" for row in rows}
    wrong = [f"{name}: no case launches it" for name in sorted(there - launched)]
    wrong += [f"{name}: has no budget" for name in sorted(there | launched) if name not in budgets]
    unknown = sorted({*budgets} - there - launched - special)
    wrong += [f"{name}: has a budget, and is no kernel or case" for name in unknown]
    for row in rows:
        budget = budgets.get(f"{row.kernel} {row.case.split()[0]}", budgets.get(row.kernel))
        if row.error:
            wrong.append(f"{row}: does not compile: {row.error}")
        elif budget is not None:
            wrong += excesses(row, budget)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    counts = f"{len(launched)} kernels in {len(rows)} rows for {len(TARGETS)} GPUs by Triton {triton.__version__}"
    verdict = f"{len(wrong)} failures" if wrong else "all within budget"
    print(f"{counts}: {verdict}, in {time.perf_counter() - start:.0f} s.")
    return bool(wrong)


if __name__ == "__main__":
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile in the interpreter. Unset it.")
    sys.path.insert(0, str(ROOT))
    from aot_cases import CASES

    stems = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    sys.exit(
        check(
            [importlib.import_module(f"fused_dino.kernels.{stem}") for stem in stems],
            [case for cases in CASES for case in cases()],
            json.loads((ROOT / "tests/aot_budgets.json").read_text()),
        )
    )
