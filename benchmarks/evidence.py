"""What a run leaves behind: one JSON file that says by itself where, how and of what it was measured.

It holds every round of every provider, and no host name and no path.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_dino

from .measure import middle, spread

SCHEMA = 2  # in 1 a GPU's `cold` had the host's time in it, where that was longer
PACKAGES = ("torch", "triton", "timm", "einops", "torchvision", "kornia", "lightly", "numpy")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Timing:
    """A provider on a row. rounds: {figure: seconds} each; none where `why` says what disqualified or stopped it."""

    name: str
    role: str
    why: str | None = None
    errors: list[float] = field(default_factory=list)  # of the value, then of each gradient
    peak_bytes: int | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)

    def figure(self, name: str) -> float | None:
        values = [sample[name] for sample in self.rounds if name in sample]
        return middle(values) if values else None

    def spread(self, name: str) -> float:
        return spread([sample[name] for sample in self.rounds if name in sample])


@dataclass
class Record:
    """A row in one direction: what was to be done, and everyone who did it."""

    op: str
    row: str
    shape: list[int]
    dtype: str
    precision: str
    reason: str
    direction: str
    kind: str  # of device: cpu or cuda
    bytes: float
    flops: float
    timings: list[Timing]
    quick: bool = False

    @property
    def headline(self) -> str:
        """The figure that ratios are taken of."""
        return "wall" if self.kind == "cpu" else "cold"

    def seconds(self, timing: Timing | None) -> float | None:
        return timing.figure(self.headline) if timing else None

    def of(self, role: str) -> Timing | None:
        """The fastest provider of a role, or None where none was timed."""
        timed = [t for t in self.timings if t.role == role and t.figure(self.headline) is not None]
        return min(timed, key=lambda t: t.figure(self.headline) or 0.0, default=None)

    def ratio(self, timing: Timing | None, over: Timing | None) -> float | None:
        """How many times faster `timing` is than `over`."""
        mine, theirs = self.seconds(timing), self.seconds(over)
        return theirs / mine if mine and theirs else None


@dataclass
class Evidence:
    """A run."""

    device: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    started: str
    quick: bool
    roofs: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    ended: str = "never"  # complete, interrupted, out of time; never: it died
    schema: int = SCHEMA

    @property
    def kind(self) -> str:
        return self.device["kind"]

    def noise(self) -> list[float]:
        """Of each row of a self-check: how far apart one provider's two medians are."""
        ratios = (record.ratio(record.of("again"), record.of("eager")) for record in self.records)
        return [abs(ratio - 1) for ratio in ratios if ratio is not None]


def begin(device: str, quick: bool) -> Evidence:
    return Evidence(describe(device), versions(), commit(), now(), quick)


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def describe(device: str) -> dict[str, Any]:
    if device == "cpu":
        mhz = sorted(float(x) for x in re.findall(r"cpu MHz\s*: ([\d.]+)", read("/proc/cpuinfo")))
        name = re.search(r"model name\s*: (.+)", read("/proc/cpuinfo"))
        return {
            "kind": "cpu",
            "name": name.group(1).strip() if name else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "clocks_mhz": [mhz[0], mhz[-1]] if mhz else None,
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # processes, over a minute
        }
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    return {
        "kind": "cuda",
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
        "multiprocessors": gpu.multi_processor_count,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or torch.version.hip,
        "found": dict(zip(fields.split(","), map(str.strip, smi(fields).split(",")), strict=False)),
    }


def smi(fields: str) -> str:
    """Of the first GPU, only ever asked: its settings stay as they are."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
    return output(command)


def output(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fused_dino": fused_dino.__version__, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Of a checkout, with a + where its code differs from it; an installed package has none."""
    if not (ROOT / ".git").exists() or not (head := output(["git", "rev-parse", "--short=12", "HEAD"], ROOT)):
        return None
    code = ["fused_dino", "kernels", "benchmarks", ":!benchmarks/results"]
    return head + "+" * bool(output(["git", "status", "--porcelain", "--", *code], ROOT))


def clean(error: BaseException) -> str:
    """An exception in one line of at most 160 characters that names no path of this machine."""
    line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    line = re.sub(r"(?:[A-Za-z]:)?[\\/][^\s'\":,;()]+", lambda path: Path(path[0]).name, line)
    return f"{type(error).__name__}: {line}"[:160]


def prepare(path: Path) -> None:
    """Raises OSError where `path` cannot be written, before anything is measured."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    part(path).write_text("")
    part(path).unlink()


def part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def save(evidence: Evidence, path: Path) -> None:
    """Whole or not at all, since a run may be ended at any time."""
    part(path).write_text(json.dumps(asdict(evidence), indent=1) + "\n", encoding="utf-8")
    part(path).replace(path)


def load(path: Path) -> Evidence:
    """Raises ValueError for a file that is no evidence of this schema."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA and (raw["schema"], raw["device"]["kind"]) != (1, "cpu"):
            raise ValueError(f"its schema is {raw['schema']}, and this reads {SCHEMA}, and of a CPU 1")
        records = [Record(**{**x, "timings": [Timing(**t) for t in x["timings"]]}) for x in raw.pop("records")]
        return Evidence(**raw, records=records)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is no results file: {error}") from error
