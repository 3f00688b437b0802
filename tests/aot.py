"""Compile every kernel for GPUs that need not be here, and hold its machine code to the budgets in aot_budgets.json.

    python tests/aot.py            (without TRITON_INTERPRET)
    python tests/aot.py --some     every case for sm_90, a few of each kernel for other GPUs

A budget holds for a kernel or, as "<kernel> <first word of the case>", for some of its cases: at most so many
`registers` and bytes of `shared` memory, and a widest `load` and `store` of at least so many bytes a thread; each is a
number, or one for every backend. Where a compiler needs limits of its own, they stand in the budget under its version.
Nothing may spill or use a stack. A kernel with dots must have matrix instructions, unless its budget says "matrix": 0.
A kernel of another dtype than fp64 may have no `f64` instruction, unless its budget says how many, and on
NVIDIA's GPUs may leave no sum in the matrix unit from one step to the next.

A case that says how many `values` one thread makes in a turn of its outermost loop, and how many `turns` that loop
takes, is counted in the machine code of sm_90: at most so many `instructions` a value, and at most so many `wavefronts`
of shared memory, `barriers`, and `conflicts` in the worst access to it, a turn.
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

import aot_shared

ROOT = Path(__file__).parent.parent
# With the KiB of shared memory that a block can have there: past them a kernel compiles, and its launch fails.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "sm_120": (GPUTarget("cuda", 120, 32), 99),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
COUNTED = ("instructions", "wavefronts", "conflicts", "barriers")  # where a case says how many values it has
LIMITS = dict.fromkeys(("registers", "shared", "f64", *COUNTED), max) | dict.fromkeys(("load", "store"), min)
BEGINNINGS = ("arith.constant", "arith.select", "tt.dot", "ttng.warp_group_dot", "ttng.warp_group_dot_wait")
COMPILER = ".".join(triton.__version__.split(".")[:2])
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
    f64: int = 0  # instructions that compute in float64 or convert
    instructions: str = "-"  # a value, on sm_90; - where the case does not say how many values there are
    wavefronts: str = "-"  # a turn, as barriers: see aot_shared.py
    conflicts: str = "-"
    barriers: str = "-"
    chained: int = 0  # products whose sums stay in the matrix unit from one step to the next
    error: str = ""  # why there is nothing to see

    def __str__(self) -> str:
        return f"{self.kernel}, {self.case} {self.options}".rstrip() + f", {self.target}"


class Elsewhere:
    """Stands in for a Triton driver while kernels are compiled for a GPU that is not here."""

    def __init__(self, target: GPUTarget) -> None:
        # Triton keeps what it knows of a target by its device, so that every target must be a device of its own.
        self.get_current_target = self.get_current_device = lambda: target
        self.get_current_stream = lambda device: 0


def launches(cases: Iterable, backend: str) -> list[dict[str, Any]]:
    """Return what the cases launch where torch is built for a vendor's GPUs: a launcher may choose by it."""
    seen = []
    for case in cases:

        def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, case: Any = case, **options: Any) -> None:
            seen.append({"kernel": kernel, "args": args, "options": options, "case": case})

        vendor = mock.patch.object(torch.version, "hip", "any" if backend == "hip" else None)
        with mock.patch.object(JITFunction, "run", record), vendor:
            case.launch()
    return seen


def dump(asm: dict[str, Any], option: str) -> str:
    """Return what cuobjdump prints of a compiled kernel."""
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
    """Registers, spills, stack and f64 instructions; the bytes of each load and store; the matrix instructions."""
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", dump(asm, "--dump-resource-usage"))}
    stack = used["STACK"] + used["LOCAL"]
    sass = dump(asm, "-sass") if stack or "tt.dot" in asm["ttir"] else ""  # takes longer than all the rest
    spills = sum(int(bits or 32) // 8 for bits in re.findall(r"\bSTL(?:\.[US]?(\d+))?", sass))
    vectors = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s", asm["ptx"])
    moves = [(kind, int(count or 1) * int(bits) // 8) for kind, count, bits in vectors]
    moves += [("ld", int(size, 0)) for size in re.findall(r"\bcp\.async\.c[ag]\..*?\], *\[.*?\], (\w+)", asm["ptx"])]
    f64 = len(re.findall(r"^\s*(?:@\S+\s+)?(?!ld|st|mov)\w+[\w.]*\.f64\b", asm["ptx"], re.MULTILINE))
    resources = {"registers": used["REG"], "spills": spills, "stack": stack, "f64": f64}
    return resources, moves, re.findall(r"\b[A-Z]+MMA\b", sass)


def hip_resources(asm: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, int]], list[str]]:
    code = asm["amdgcn"]
    used = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)$", code, re.MULTILINE)}
    spills = 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"])
    unit = {"dword": 4, "short": 2, "byte": 1}
    move = r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(dword|short|byte)(?:x(\d))?"
    moves = [(kind, int(count or 1) * unit[name]) for kind, name, count in re.findall(move, code)]
    resources = {"registers": used["vgpr_count"], "spills": spills, "stack": used["private_segment_fixed_size"]}
    resources["f64"] = len(re.findall(r"\bv_\w*f64", code))
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
        return replace(row, error=f"does not compile: {error}")
    used, moves, matrix = (cuda_resources if gpu.backend == "cuda" else hip_resources)(compiled.asm)
    dots = " ".join([str(len(matrix)), *sorted(set(matrix))]) if "tt.dot" in compiled.asm["ttir"] else "-"
    load, store = (max((size for kind, size in moves if kind[0] == first), default=0) for first in "ls")
    row = replace(row, **used, shared=compiled.metadata.shared, load=load, store=store, matrix=dots)
    row = replace(row, chained=chained(compiled.asm["ttgir"]))
    if launch["case"].values and target == "sm_90":
        try:
            row = replace(row, **counts(launch, compiled))
        except (NotImplementedError, ValueError) as error:
            return replace(row, error=f"cannot be counted: {error}")
    return row


def chained(ttgir: str) -> int:
    """Count the products that begin with neither a constant nor another product of the same step."""
    producers, count = {}, 0  # the operation that last wrote each value: loops use one name again
    for name, operation, operands in re.findall(r"^\s*(%\w+)(?::\d+)? = ([\w.]+) ?(.*)", ttgir, re.MULTILINE):
        is_product = operation in ("tt.dot", "ttng.warp_group_dot")
        if is_product and producers.get(re.findall(r"%\w+", operands)[2]) not in BEGINNINGS:
            count += 1
        converted = operation == "ttg.convert_layout"
        producers[name] = producers.get(re.findall(r"%\w+", operands)[0]) if converted else operation
    return count


def arguments(launch: dict[str, Any], compiled: Any) -> list[Any]:
    """Return the arguments of the compiled kernel: those that are no constants, and 0 for a pointer."""
    values = dict(zip(launch["kernel"].arg_names, launch["args"], strict=False)) | launch["options"]
    types = {name: kind for name, kind in compiled.src.signature.items() if kind != "constexpr"}
    return [0 if kind.startswith("*") else values[name] for name, kind in types.items()]


def counts(launch: dict[str, Any], compiled: Any) -> dict[str, str]:
    """Count the instructions and the traffic of a case that says how many values it has."""
    case, sass = launch["case"], dump(compiled.asm, "-sass")
    threads = 32 * compiled.metadata.num_warps
    found = aot_shared.traffic(compiled.asm["ptx"], sass, threads, arguments(launch, compiled), case.turns)
    return {
        "instructions": f"{instructions(sass, case.values, case.turns):.1f}",
        **{name: f"{value:g}" for name, value in found._asdict().items()},
    }


def table(rows: list[Row]) -> str:
    names = [field.name for field in fields(Row) if field.name != "error"]
    cells = [names, *([str(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


def excesses(row: Row, budget: dict[str, Any]) -> Iterator[str]:
    """How a row breaks its budget."""
    gpu, kib = TARGETS[row.target]
    budget = budget | budget.get(COMPILER, {})
    budget = {key: value.get(gpu.backend) if isinstance(value, dict) else value for key, value in budget.items()}
    most = {"registers": budget["registers"], "spills": 0, "stack": 0, "shared": min(budget["shared"], kib * 1024)}
    if "fp64" not in row.case.split():
        most |= {"f64": budget.get("f64", 0)} | ({"chained": 0} if gpu.backend == "cuda" else {})
    least = {"load": budget["load"], "store": budget["store"], "matrix": budget.get("matrix", 1)}
    for name, limit in most.items():
        if getattr(row, name) > limit:
            yield f"{row}: {name} {getattr(row, name)}, budget at most {limit}"
    for name in COUNTED:
        found = getattr(row, name)
        if found != "-" and float(found) > budget.get(name, 0):
            yield f"{row}: {name} {found}, budget at most {budget.get(name, 0)}"
    for name, limit in least.items():
        found = str(getattr(row, name)).split()[0]
        if found != "-" and int(found) < limit:
            yield f"{row}: {name} {getattr(row, name)}, budget at least {limit}"


def reached(rows: list[Row]) -> dict[str, Any]:
    """The tightest limits that some rows are within, for whoever fits a budget anew."""
    limits: dict[str, Any] = {}
    for name, tightest in LIMITS.items():
        found: dict[str, list[float]] = {}
        for row in rows:
            if str(getattr(row, name)) != "-" and not (name == "f64" and "fp64" in row.case.split()):
                found.setdefault(TARGETS[row.target][0].backend, []).append(float(getattr(row, name)))
        values = {backend: float(f"{tightest(some):g}") for backend, some in found.items()}
        values = {backend: int(value) if value.is_integer() else value for backend, value in values.items()}
        if any(values.values()):
            limits[name] = values if len({*values.values()}) > 1 else next(iter(values.values()))
    return limits


def one_of_each(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first launch of each kernel, and of each dtype where it has matrix products."""
    kinds = {(x["kernel"], "PRECISION" in x["options"] and x["case"].name.split()[0]): x for x in reversed(seen)}
    return list(kinds.values())


def check(modules: Iterable[ModuleType], cases: Iterable, budgets: dict[str, Any], some: bool = False) -> int:
    """Compile what the cases launch, print the table and everything wrong; the exit status."""
    start = time.perf_counter()
    cases = list(cases)
    seen = {backend: launches(cases, backend) for backend in ("cuda", "hip")}
    chosen = {backend: one_of_each(found) if some else found for backend, found in seen.items()}
    JOBS[:] = [
        (launch, target)
        for target, (gpu, _) in TARGETS.items()
        for launch in (seen if target == "sm_90" else chosen)[gpu.backend]
    ]
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool:
        rows = sorted(pool.map(compile_job, range(len(JOBS))), key=lambda row: row.kernel)
    print(table([row for row in rows if not row.error]))

    there = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    launched = {launch["kernel"].__name__ for launch, _ in JOBS}
    cases_of = {f"{row.kernel} {row.case.split()[0]}" for row in rows}
    wrong = [f"{name}: no case launches it" for name in sorted(there - launched)]
    wrong += [f"{name}: has no budget" for name in sorted(there | launched) if name not in budgets]
    unknown = sorted({*budgets} - there - launched - cases_of)
    wrong += [f"{name}: has a budget, and is no kernel or case" for name in unknown]
    wrong += [f"{row}: {row.error}" for row in rows if row.error]
    held: dict[str, list[Row]] = {}  # the rows of each budget
    for row in rows:
        if not row.error:
            special = f"{row.kernel} {row.case.split()[0]}"
            held.setdefault(special if special in budgets else row.kernel, []).append(row)
    reports = []
    for name, those in held.items():
        broken = [line for row in those if name in budgets for line in excesses(row, budgets[name])]
        reports += [f"reached: {json.dumps(name)}: {json.dumps(reached(those))}"] if broken else []
        wrong += broken
    print(*wrong, *reports, sep="\n", end="\n" if wrong else "")
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
            some=sys.argv[1:] == ["--some"],
        )
    )
