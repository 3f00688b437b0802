"""Keep a run in one JSON file: the machine, the software, and every round of every provider.

It holds no host name and no path.
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
from statistics import median
from typing import Any

import torch

import fused_dino

from .measure import spread

SCHEMA = 2
PACKAGES = ("torch", "triton", "timm", "einops", "torchvision", "kornia", "lightly", "numpy")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Timing:
    """A provider on a row.

    why: What excluded or stopped it. It then has no rounds.
    errors: Those of the value, then of each gradient.
    rounds: Each {figure: seconds of a call}.
    """

    name: str
    role: str
    why: str | None = None
    errors: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)

    def figure(self, name: str) -> float | None:
        values = [sample[name] for sample in self.rounds if name in sample]
        return median(values) if values else None

    def spread(self, name: str) -> float:
        return spread([sample[name] for sample in self.rounds if name in sample])


@dataclass
class Record:
    """A row in one direction: its work, and the times of each provider.

    images: How many a call sees, where a whole model runs.
    """

    op: str
    row: str
    precision: str
    direction: str
    kind: str  # of device: cpu or cuda
    bytes: float
    flops: float
    timings: list[Timing]
    quick: bool = False
    images: int | None = None

    @property
    def headline(self) -> str:
        """Name the figure that ratios are taken of."""
        return "wall" if self.kind == "cpu" else "cold"

    def seconds(self, timing: Timing | None) -> float | None:
        return timing.figure(self.headline) if timing else None

    def of(self, role: str) -> Timing | None:
        """Return the fastest provider of a role, or None where none was timed."""
        timed = [t for t in self.timings if t.role == role and t.figure(self.headline) is not None]
        return min(timed, key=lambda t: t.figure(self.headline) or 0.0, default=None)

    def ratio(self, timing: Timing | None, over: Timing | None) -> float | None:
        """Return how many times faster `timing` is than `over`."""
        mine, theirs = self.seconds(timing), self.seconds(over)
        return theirs / mine if mine and theirs else None


@dataclass
class Evidence:
    """A run. ended: complete, interrupted, out of time or how the GPU was lost; never: the run died."""

    device: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    started: str
    quick: bool
    roofs: dict[str, float] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    ended: str = "never"
    schema: int = SCHEMA

    @property
    def kind(self) -> str:
        return self.device["kind"]

    def noise(self) -> list[float]:
        """Return, for each row of a self-check, how far apart eager's two medians are."""
        ratios = (record.ratio(record.of("again"), record.of("eager")) for record in self.records)
        return [abs(ratio - 1) for ratio in ratios if ratio is not None]


def begin(device: str, quick: bool) -> Evidence:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Evidence(describe(device), versions(), commit(), now, quick)


def describe(device: str) -> dict[str, Any]:
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
        return {
            "kind": "cpu",
            "name": name.group(1).strip() if name else platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # processes, over a minute
        }
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    found = output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"])
    return {
        "kind": "cuda",
        "name": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
        "multiprocessors": gpu.multi_processor_count,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or torch.version.hip,
        "found": dict(zip(fields.split(","), map(str.strip, found.split(",")), strict=False)),
    }


def output(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "fused_dino": fused_dino.__version__, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found.setdefault(package, version(package))
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str | None:
    """Name the checkout's commit, with a + where its code differs from it. An installed package has none."""
    if not (ROOT / ".git").exists() or not (head := output(["git", "rev-parse", "--short=12", "HEAD"], ROOT)):
        return None
    code = ["fused_dino", "kernels", "benchmarks", ":!benchmarks/results"]
    return head + "+" * bool(output(["git", "status", "--porcelain", "--", *code], ROOT))


def clean(error: BaseException) -> str:
    """Say an exception in one line of at most 160 characters that names no path of this machine."""
    line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
    line = re.sub(r"(?:[A-Za-z]:)?[\\/][^\s'\":,;()]+", lambda path: Path(path[0]).name, line)
    return f"{type(error).__name__}: {line}"[:160]


def prepare(path: Path) -> None:
    """Raise OSError where `path` cannot be written, before anything is measured."""
    if path.exists() and not path.is_file():  # save would put a file in the place of a folder, a pipe or a device
        raise FileExistsError(f"it is {'a folder' if path.is_dir() else 'no regular file'}")
    part(path).write_text("")
    part(path).unlink()


def part(path: Path) -> Path:
    """Return what is written first, beside the file that a link leads to."""
    file = path.resolve()
    return file.with_name(f"{file.name}.part")


def save(evidence: Evidence, path: Path) -> None:
    """Write the file whole or not at all, since a run may be ended at any time."""
    part(path).write_text(json.dumps(asdict(evidence), indent=1) + "\n", encoding="utf-8")
    part(path).replace(path.resolve())


def load(path: Path) -> Evidence:
    """Read a file. Raise ValueError for one that is no evidence of this schema."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"its schema is {raw['schema']}, and this reads {SCHEMA}")
        records = [Record(**{**x, "timings": [Timing(**t) for t in x["timings"]]}) for x in raw.pop("records")]
        return Evidence(**raw, records=records)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} is no results file: {error}") from error
