"""Run smoke, tests, memory checkers and benchmarks on a GPU, within a limit: `make gpu`.

    python3 -m benchmarks.gpu OUT [--seconds 540] [--only STAGE] [--device cuda|cpu]

docs/gpu.md says what it runs, what it leaves in OUT, and what its exit status means.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import device_tests, digest
from .stages import Outcome, Stage, run_all

SECONDS = 540.0  # a job of ten minutes, with a minute to start in
STAGES = ("smoke", "tests", "checkers", "benchmarks", "wide")
ASKED = ("wide",)  # run where they are asked for
SANITIZER = "compute-sanitizer"
ONE_ROW = "cosine_loss 256 x 1024 float32 (IEEE), forward + backward"
HANDFUL = "(test_is_as_accurate_as_eager and cosine_loss and (3x16 or 5x37)) or test_the_kernel_is_what_runs"


def stages(out: Path, device: str, seconds: float = SECONDS) -> list[tuple[str, Stage]]:
    """Return all stages in their order, each with the name that --only takes."""
    module = [sys.executable, "-m"]
    smoke = Stage("smoke", [*module, "benchmarks.smoke", str(out), "--device", device, "--seconds", "{seconds}"], 150)
    one: tuple[tuple[str, str], ...] = (("OMP_NUM_THREADS", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "1"))
    if device == "cpu":
        tests = device_tests.command("tests", out / "tests.jsonl", 1, ("test_ops.py", "test_kernels.py"))
        tests, environment = [*tests, "-k", HANDFUL], (*one, ("TRITON_INTERPRET", "1"))
    else:
        tests, environment = device_tests.command("tests", out / "tests.jsonl", cpus()), one
    wide = Stage("wide", device_tests.command("wide", out / "wide.jsonl", cpus()), seconds, environment=one)
    run = [*module, "benchmarks", "run", "--device", device, "--json", str(evidence_file(out, device))]
    run += ["--row", ONE_ROW] if device == "cpu" else ["--self-check"]
    rest = max(30.0, seconds - 510)
    return [
        ("smoke", smoke),
        ("tests", Stage("tests", tests, 270, environment=environment)),
        *(("checkers", checker(name, limit, device)) for name, limit in (("memcheck", 55.0), ("racecheck", 35.0))),
        ("benchmarks", Stage("benchmarks", [*run, "--seconds", "{seconds}"], rest, proves=False)),
        ("wide", wide),
    ]


def chosen(out: Path, device: str, seconds: float, only: Sequence[str]) -> list[Stage]:
    """Return the stages that --only names, or all but ASKED."""
    wanted = only or [name for name in STAGES if name not in ASKED]
    return [stage for name, stage in stages(out, device, seconds) if name in wanted]


def checker(name: str, seconds: float, device: str) -> Stage:
    """Return the stage of one of compute-sanitizer's tools, over a small case of every variant of a kernel."""
    tool = sanitizer() if device == "cuda" else None
    if tool is None:
        where = "is neither on PATH nor beside nvcc" if device == "cuda" else "is looked for where there is a GPU"
        return Stage(name, [], seconds, missing=f"{SANITIZER} {where}")
    command = [tool, "--tool", name, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "benchmarks.exercise", "--seconds", "{seconds}"]
    # Each tensor an allocation of its own: torch's allocator hides an access beyond one.
    return Stage(name, command, seconds, environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))


def sanitizer() -> str | None:
    """Find compute-sanitizer on PATH, beside nvcc, or in the CUDA toolkit that the environment names."""
    nvcc = shutil.which("nvcc")
    folders = [os.path.dirname(os.path.realpath(nvcc))] if nvcc else []
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders += [os.path.join(home, "bin") for home in homes if home]
    found = (shutil.which(SANITIZER, path=path) for path in (None, *folders))
    return next((path for path in found if path), None)


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evidence_file(out: Path, device: str) -> Path:
    """Name the evidence after the device, as benchmarks/results/ does."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return out / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for logs, evidence and summary.txt")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="LIMIT", help=f"for everything; {SECONDS:g}")
    parser.add_argument("--only", choices=STAGES, action="append", default=[], help="this stage; may be given again")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run on what is smallest")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"{parser.prog}: there is no GPU that this torch can use; --device cpu is a dry run", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    out = options.out.resolve()
    # One cache for all stages: what smoke compiles no test compiles again.
    os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"fused_dino-triton-{os.getuid()}"))
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever ends the run; in the background a shell ignores the first
        signal.signal(number, signal.default_int_handler)

    digest.write(out, [])

    def ended(outcomes: list[Outcome]) -> None:
        digest.write(out, outcomes)
        print(digest.line(outcomes[-1], out), flush=True)

    outcomes = run_all(chosen(out, options.device, options.seconds, options.only), out, options.seconds, ended)
    print("\n" + (out / "summary.txt").read_text())
    return int(any(outcome.bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
