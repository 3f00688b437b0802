"""What the machine code of a compiled kernel says of it: what it uses, what it moves, and what it executes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import triton

BEGINNINGS = ("arith.constant", "arith.select", "tt.dot", "ttng.warp_group_dot", "ttng.warp_group_dot_wait")


def dump(asm: dict[str, Any], option: str) -> str:
    """Return what cuobjdump prints of a compiled kernel."""
    return dumped(asm["cubin"], option)


@lru_cache(maxsize=1)  # to disassemble a kernel takes longer than to compile it
def dumped(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str, values: float, turns: int) -> float:
    """Count the instructions that one thread executes for each of its values. The outermost loop counts `turns` times.

    A loop inside of it counts once, so a case with such a loop must be one in which it takes a single turn.
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


def loops_of(sass: str) -> Iterator[list[str]]:
    """Yield the instructions of each loop."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass)]
    code = {at: text for at, text in lines if not text.startswith("NOP")}
    for at, text in code.items():
        for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text):
            if int(to, 16) < at:
                yield [each for here, each in code.items() if int(to, 16) <= here <= at]


def rates(options: dict[str, Any], sass: str) -> dict[str, str]:
    """Return the instructions of a warp for 1,000 multiply-adds of VICReg's product, by its launch's options.

    `raw`: those of the loop over rows as they are, BLOCK_K deep, once for each plane of the other operand. `planes`:
    those of the loop over planes, PLANES_K deep, for each pair of planes that counts.
    """
    planes = options["PLANES"]
    if options["RAW"]:
        planes = options.get("PRODUCT_PLANES", planes)
    steps = {"planes": (options["PLANES_K"], planes * (planes + 1) // 2)}
    if options["RAW"]:
        steps["raw"] = (options["BLOCK_K"], options.get("PRODUCT_PLANES", 1))
    found = {}
    for loop in loops_of(sass):
        matrix = sum("HGMMA" in text for text in loop)
        for name, (depth, products) in steps.items():
            if matrix == depth // 16 * products:
                of_all = 1000 * len(loop) * options["num_warps"] / (options["TILE"] ** 2 * depth)
                found[name] = f"{of_all:.3f}"
    return found
