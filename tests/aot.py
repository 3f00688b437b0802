"""Compile every kernel for GPUs that need not be here, and hold its machine code to the budgets in aot_budgets.json.

    python tests/aot.py            (without TRITON_INTERPRET)
    python tests/aot.py --some     every case for sm_90, a few of each kernel for other GPUs
    python tests/aot.py --op NAME  the cases of NAME_cases in aot_cases.py, and the kernels of kernels/NAME.py

A budget belongs to a kernel, or as "<kernel> <first word of the case>" to some of its cases. It gives the most
`registers` and bytes of `shared` memory, and the least bytes of a thread's widest `load` and `store`. A limit is a
number, or a dict by backend, which may add one for a single GPU. Limits that one version of Triton needs stand under
that version. Nothing may spill or use a stack. A kernel with dots must have matrix instructions, unless its budget says
"matrix": 0. A kernel of another dtype than fp64 may have no `f64` instruction, unless its budget says how many. On
NVIDIA's GPUs no sum may stay in the matrix unit from one step to the next. Where a kernel has no budget, or breaks it,
the tightest lines for aot_budgets.json that this compiler's code meets are printed.

A budget may limit a warp's instructions for 1,000 multiply-adds of VICReg's products on sm_90: of rows as they are
(`raw`), and of `planes`.

A case may say how many `values` one thread makes in a turn of its outermost loop, and how many `turns` that loop takes.
The machine code of sm_90 is then counted: the `instructions` of a value; and in a turn the `wavefronts` of shared
memory, the `barriers`, and the `conflicts` of the worst access.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import sys
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
from aot_code import chained, cuda_resources, dump, hip_resources, instructions, rates

sys.path.insert(0, str(Path(__file__).parent.parent))
from fused_dino.ops import vicreg_tiles

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
RATES = ("raw", "planes")
REQUIRED = ("registers", "shared", "load", "store")  # of every budget
LIMITS = dict.fromkeys(REQUIRED[:2], max) | dict.fromkeys(REQUIRED[2:], min) | dict.fromkeys(("f64", *COUNTED), max)
WITH_OWN_BUDGET = ("fp64", "unaligned")  # first words of cases whose code is unlike the others'
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
    raw: str = "-"  # instructions of a warp a 1,000 multiply-adds of VICReg's product, of rows as they are
    planes: str = "-"  # the same of planes
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


def launches(cases: Iterable, target: str) -> list[dict[str, Any]]:
    """Return what the cases launch on a GPU, with torch built for its vendor: launchers may choose by these."""
    seen, gpu = [], TARGETS[target][0]
    hip = gpu.backend == "hip"
    limits = vicreg_tiles.LIMITS.get(0 if hip else gpu.arch // 10, vicreg_tiles.ELSEWHERE)
    for case in cases:

        def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, case: Any = case, **options: Any) -> None:
            seen.append({"kernel": kernel, "args": args, "options": options, "case": case})

        vendor = mock.patch.object(torch.version, "hip", "any" if hip else None)
        chosen = mock.patch.object(vicreg_tiles, "limits_of", return_value=limits)
        with mock.patch.object(JITFunction, "run", record), vendor, chosen:
            case.launch()
    return seen


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
    if "PLANES_K" in launch["options"] and target == "sm_90":
        row = replace(row, **rates(launch["options"], dump(compiled.asm, "-sass")))
    if launch["case"].values and target == "sm_90":
        try:
            row = replace(row, **counts(launch, compiled))
        except (NotImplementedError, ValueError) as error:
            return replace(row, error=f"cannot be counted: {error}")
    return row


def arguments(launch: dict[str, Any], compiled: Any) -> list[Any]:
    """Return the arguments of the compiled kernel: all but the constants, with 0 for each pointer."""
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
    """Yield each way in which a row breaks its budget."""
    gpu, kib = TARGETS[row.target]
    budget = budget | budget.get(COMPILER, {})
    of_each = {key: value if isinstance(value, dict) else {gpu.backend: value} for key, value in budget.items()}
    budget = {key: value.get(row.target, value.get(gpu.backend)) for key, value in of_each.items()}
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
    for name in RATES:
        found = getattr(row, name)
        if name in budget and found != "-" and float(found) > budget[name]:
            yield f"{row}: {name} {found}, budget at most {budget[name]}"
    for name, limit in least.items():
        found = str(getattr(row, name)).split()[0]
        if found != "-" and int(found) < limit:
            yield f"{row}: {name} {getattr(row, name)}, budget at least {limit}"


def reached(rows: list[Row]) -> dict[str, Any]:
    """Return the tightest budget that the rows meet, to be copied into aot_budgets.json."""
    limits: dict[str, Any] = {}
    for name, tightest in LIMITS.items():
        found: dict[str, list[float]] = {}
        for row in rows:
            if str(getattr(row, name)) != "-" and not (name == "f64" and "fp64" in row.case.split()):
                found.setdefault(TARGETS[row.target][0].backend, []).append(float(getattr(row, name)))
        values = {backend: float(f"{tightest(some):g}") for backend, some in found.items()}
        values = {backend: int(value) if value.is_integer() else value for backend, value in values.items()}
        if any(values.values()) or name in REQUIRED:
            limits[name] = values if len({*values.values()}) > 1 else next(iter(values.values()))
    return limits | ({"matrix": 0} if any(row.matrix == "0" for row in rows) else {})


def budgets_of(rows: Iterable[Row], budgets: dict[str, Any]) -> dict[str, list[Row]]:
    """Return the rows of each budget. A kernel without a budget gets the budgets that its cases need."""
    held: dict[str, list[Row]] = {}
    for row in rows:
        word = row.case.split()[0]
        own = f"{row.kernel} {word}" in budgets or (row.kernel not in budgets and word in WITH_OWN_BUDGET)
        held.setdefault(f"{row.kernel} {word}" if own else row.kernel, []).append(row)
    return held


def as_written(name: str, budget: dict[str, Any]) -> str:
    """Return a budget as it stands in aot_budgets.json."""
    limits = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in budget.items())
    return f"  {json.dumps(name)}: {{\n{limits}\n  }},"


def one_of_each(seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first launch of each kernel, and of each dtype where it has matrix products."""
    kinds = {(x["kernel"], "OPERAND" in x["options"] and x["case"].name.split()[0]): x for x in reversed(seen)}
    return list(kinds.values())


def check(
    modules: Iterable[ModuleType], cases: Iterable, budgets: dict[str, Any], some: bool = False, one_op: bool = False
) -> int:
    """Compile what the cases launch, print the table and everything wrong, and return the exit status.

    one_op: leave out the budgets of kernels that are neither in `modules` nor launched.
    """
    start = time.perf_counter()
    cases = list(cases)
    JOBS[:] = []
    for target in TARGETS:
        seen = launches(cases, target)
        JOBS.extend((launch, target) for launch in (one_of_each(seen) if some and target != "sm_90" else seen))
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1), multiprocessing.get_context("fork")) as pool:
        rows = sorted(pool.map(compile_job, range(len(JOBS))), key=lambda row: row.kernel)
    print(table([row for row in rows if not row.error]))

    there = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    launched = {launch["kernel"].__name__ for launch, _ in JOBS}
    cases_of = {f"{row.kernel} {row.case.split()[0]}" for row in rows}
    wrong = [f"{name}: no case launches it" for name in sorted(there - launched)]
    wrong += [f"{name}: has no budget" for name in sorted(there | launched) if name not in budgets]
    known = there | launched
    unknown = sorted(name for name in {*budgets} - known - cases_of if not one_op or name.split()[0] in known)
    wrong += [f"{name}: has a budget, and is no kernel or case" for name in unknown]
    wrong += [f"{row}: {row.error}" for row in rows if row.error]
    reports = []
    for name, those in budgets_of([row for row in rows if not row.error], budgets).items():
        broken = [line for row in those if name in budgets for line in excesses(row, budgets[name])]
        wrong += broken
        if broken or name not in budgets:
            reports.append(as_written(name, reached(those)))
    reports[:0] = [f"What Triton {triton.__version__} is just within:"] if reports else []
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

    ops = {cases.__name__.removesuffix("_cases"): cases for cases in CASES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--some", action="store_true", help="a few cases of each kernel, but for sm_90")
    parser.add_argument("--op", choices=ops, help="the cases and kernels of one op")
    options = parser.parse_args()
    stems = [options.op] if options.op else sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    sys.exit(
        check(
            [importlib.import_module(f"fused_dino.kernels.{stem}") for stem in stems],
            [case for op, cases in ops.items() if options.op in (None, op) for case in cases()],
            json.loads((ROOT / "tests/aot_budgets.json").read_text()),
            some=options.some,
            one_op=options.op is not None,
        )
    )
