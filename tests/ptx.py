"""Run the PTX of a compiled kernel in numpy, all threads of one program at once, and note its use of shared memory.

It has the instructions of the kernels that are counted, and raises at any other. The threads of a program must take the
same branches.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
CODES = {"b": "u", "u": "u", "s": "i", "f": "f"}
TYPES = {f"{kind}{8 * size}": np.dtype(f"{code}{size}") for kind, code in CODES.items() for size in (2, 4, 8)}
TYPES |= {"b8": np.dtype("u1"), "u8": np.dtype("u1"), "s8": np.dtype("i1"), "pred": np.dtype("?")}
COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
ROUNDED = {"rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil, "rni": np.rint}


def permuted(a: Array, b: Array, places: Array) -> Array:
    """Pick four of the eight bytes of two registers, each by four bits; the uppermost bit takes the sign alone."""
    places = places[:, None] >> np.arange(0, 16, 4, "u4") & 15
    picked = np.take_along_axis(np.stack([a, b], 1).view("u1"), (places & 7).astype("i8"), 1)
    return np.where(places & 8, np.where(picked & 128, 255, 0), picked).astype("u1").view("u4")[:, 0]


ARITHMETIC = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": lambda a, b, c: (a.astype(np.float64) * b + c).astype(a.dtype),
    "div": lambda a, b: a / b if a.dtype.kind == "f" else (a - np.fmod(a, b)) // b,
    "rem": np.fmod,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "selp": lambda a, b, which: np.where(which, a, b),
    "bfe": lambda a, first, bits: a << (a.itemsize * 8 - first - bits) >> (a.itemsize * 8 - bits),
    "prmt": permuted,
}


class Access(NamedTuple):
    """An instruction's use of shared memory: each live thread reads or writes `size` bytes at its address."""

    line: int
    kind: str  # as the machine code calls it: LDS, STS, or BAR for a barrier, of no thread
    address: Array
    live: Array
    size: int = 0


class Instruction(NamedTuple):
    name: str
    modifiers: list[str]
    operands: list[str]
    guard: str  # a predicate, or nothing
    negated: bool


class Code(NamedTuple):
    parameters: dict[str, np.dtype]
    instructions: list[Instruction]
    labels: dict[str, int]
    sizes: dict[str, int]  # bytes of a register, by what its name begins with; 0 of a predicate


def parse(ptx: str) -> Code:
    """The first kernel of a module."""
    ptx = re.sub(r"//.*", "", ptx)
    head, body = re.search(r"\.entry\s+\w+\((.*?)\)[^{]*\{(.*?)^\}", ptx, re.DOTALL | re.MULTILINE).groups()
    parameters = {name: TYPES[kind] for kind, name in re.findall(r"\.param \.(\w+).*?(\w+),?\n", head)}
    code = Code(parameters, [], {}, {})
    for line in map(str.strip, body.splitlines()):
        if label := re.fullmatch(r"(\S+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif register := re.fullmatch(r"\.reg \.[a-z]+(\d*)\s+(%[a-z]+)<\d+>;", line):
            code.sizes[register[2]] = int(register[1] or 0) // 8
        elif line and not line.startswith("."):
            negated, guard, op, rest = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([^\s;]+)\s*(.*);", line).groups()
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            name, *modifiers = op.split(".")
            code.instructions.append(Instruction(name, modifiers, operands, guard or "", bool(negated)))
    return code


class Program:
    """The threads of one program: the bits in their registers, and their shared memory."""

    def __init__(
        self, ptx: str, threads: int, arguments: Sequence[Any], index: Sequence[int], memory: Array | None, shared: int
    ) -> None:
        self.code, self.threads = parse(ptx), threads
        self.values = {f"%ctaid.{axis}": np.full(threads, i, "u4") for axis, i in zip("xyz", index, strict=False)}
        self.values["%tid.x"] = np.arange(threads, dtype="u4")
        self.values["global_smem"] = np.zeros(threads, "u4")
        scratch = [0] * (len(self.code.parameters) - len(arguments))  # Triton's own memory, the last parameters
        self.parameters = {
            name: np.full(threads, value, kind)
            for (name, kind), value in zip(self.code.parameters.items(), [*arguments, *scratch], strict=True)
        }
        self.memory, self.shared = memory, np.zeros(shared, "u1")
        self.accesses: list[Access] = []

    def read(self, operand: str, kind: np.dtype) -> Array:
        if operand.startswith("{"):
            parts = operand.strip("{} ").split(",")
            part = np.dtype(f"u{kind.itemsize // len(parts)}")
            return np.stack([self.read(x.strip(), part) for x in parts], 1).view(kind)[:, 0]
        if operand in self.values:
            bits = self.values[operand]
            return bits if kind == np.bool_ else bits.view(kind)[:: bits.itemsize // kind.itemsize]  # the lowest bytes
        hexadecimal = operand[:2] in ("0f", "0d")
        number = int(operand[2:], 16) if hexadecimal else int(operand.rstrip("U"), 0)
        return np.full(self.threads, number % 2 ** (8 * kind.itemsize), f"u{kind.itemsize}").view(kind)

    def write(self, operand: str, value: Array, live: Array) -> None:
        if operand.startswith("{"):
            parts = operand.strip("{} ").split(",")
            value = np.ascontiguousarray(value).view(f"u{value.itemsize // len(parts)}").reshape(self.threads, -1)
            for part, column in zip(parts, value.T, strict=True):
                self.write(part.strip(), np.ascontiguousarray(column), live)
        elif operand != "_":
            size = self.code.sizes[re.match(r"%[a-z]+", operand)[0]]
            if size:
                value = value.astype(f"{value.dtype.kind}{max(size, value.itemsize)}").view(f"u{size}")
            old = self.values.get(operand, np.zeros_like(value))
            self.values[operand] = np.where(live, value, old)

    def address(self, operand: str) -> Array:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip(), TYPES["u64"] if "%rd" in base else TYPES["u32"]).astype("i8") + int(offset or 0)

    def move(self, line: int, op: Instruction, live: Array) -> None:
        """Load or store. Without `memory`, global memory reads as zeros."""
        kind, space = TYPES[op.modifiers[-1]], op.modifiers[0].partition("::")[0]
        target, place = op.operands if op.name == "ld" else op.operands[::-1]
        registers = [name.strip() for name in target.strip("{} ").split(",")]
        if space == "param":
            self.write(target, self.parameters[place.strip("[]")].view(kind), live)
            return
        at, size = self.address(place), kind.itemsize * len(registers)
        if space == "shared":
            self.accesses.append(Access(line, "LDS" if op.name == "ld" else "STS", at, live, size))
        memory = self.shared if space == "shared" else self.memory
        bytes_of = at[live, None] + np.arange(size)
        if op.name == "ld":
            found = np.zeros((self.threads, size), "u1")
            if memory is not None:
                found[live] = memory[bytes_of]
            for register, column in zip(registers, found.view(kind).T, strict=True):
                self.write(register, np.ascontiguousarray(column), live)
        elif memory is not None:
            values = np.stack([self.read(register, kind) for register in registers], 1)
            memory[bytes_of] = values.view("u1")[live]

    def convert(self, op: Instruction) -> Array:
        """Convert to another type. Two numbers of 16 bits make one register, the first on top."""
        to, source = op.modifiers[-2:]
        if "16" in to and source == "f32":
            parts = [half(self.read(x, TYPES["f32"]), to) for x in op.operands[1:]]
            return parts[0] if len(parts) == 1 else parts[0].astype("u4") << 16 | parts[1]
        if source == "bf16":
            return (self.read(op.operands[1], TYPES["u16"]).astype("u4") << 16).view("f4")
        value = self.read(op.operands[1], TYPES[source])
        (rounded,) = {ROUNDED[name] for name in op.modifiers if name in ROUNDED} or {np.asarray}
        return rounded(value).astype(TYPES[to])

    def compute(self, op: Instruction) -> Array:
        kind = TYPES[op.modifiers[-1]]
        if op.name == "setp":
            compared = COMPARISONS[op.modifiers[0]](*(self.read(x, kind) for x in op.operands[1:3]))
            rest = [self.read(x, TYPES["pred"]) for x in op.operands[3:]]
            return ARITHMETIC[op.modifiers[1]](compared, *rest) if rest else compared
        kinds = [kind] * len(op.operands[1:])
        kinds[1:] = {"selp": [kind, TYPES["pred"]], "shl": [TYPES["u32"]], "shr": [TYPES["u32"]]}.get(
            op.name, kinds[1:]
        )
        if "wide" in op.modifiers:
            double = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
            factors = [self.read(x, kind).astype(double) for x in op.operands[1:3]]
            return ARITHMETIC[op.name](*factors, *(self.read(x, double) for x in op.operands[3:]))
        return ARITHMETIC[op.name](*map(self.read, op.operands[1:], kinds)).astype(kind)

    def run(self) -> list[Access]:
        line, everywhere, nowhere = 0, np.ones(self.threads, bool), np.zeros(self.threads, bool)
        while line < len(self.code.instructions):
            op = self.code.instructions[line]
            live = self.values[op.guard] ^ op.negated if op.guard else everywhere
            line += 1
            if op.name in ("bra", "ret"):
                if live.any() != live.all():
                    raise NotImplementedError(f"threads part at {op}")
                if live.all():
                    line = self.code.labels[op.operands[0]] if op.name == "bra" else len(self.code.instructions)
            elif op.name in ("bar", "barrier"):
                self.accesses.append(Access(line, "BAR", np.zeros(self.threads, "i8"), nowhere))
            elif op.name in ("ld", "st"):
                self.move(line, op, live)
            elif op.name in (*ARITHMETIC, "cvt", "setp"):
                value = self.convert(op) if op.name == "cvt" else self.compute(op)
                self.write(op.operands[0], value, live)
            else:
                raise NotImplementedError(f"an unknown instruction: {op}")
        return self.accesses


def half(value: Array, to: str) -> Array:
    """Return the bits of float32 rounded to 16. A NaN is not handled."""
    if to.startswith("f16"):
        return value.astype("f2").view("u2")
    bits = value.view("u4")
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype("u2")


def run(
    ptx: str, threads: int, arguments: Sequence[Any], index: Sequence[int] = (0, 0), memory: Array | None = None,
    shared: int = 2**16,
) -> list[Access]:  # fmt: skip
    """Return one program's uses of shared memory. Pointers among the arguments are offsets in `memory`, of bytes."""
    with np.errstate(all="ignore"):
        return Program(ptx, threads, arguments, index, memory, shared).run()
