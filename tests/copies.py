"""Runs Python in forks of one process that has imported torch and timm, whose import takes a new process seconds.

The process has not imported the package: each fork imports its own, from the folder that it is given.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PRELOADED = ("torch", "torch.export", "torch._dynamo.testing", "torch.distributed.fsdp", "timm", "einops", "pytest")
SERVER = """
import contextlib, gc, importlib, json, os, runpy, signal, sys, types

sys.path.remove("")
for name in sys.argv[1:]:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
gc.freeze()  # what collects garbage would look through all of it
for line in sys.stdin:
    child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

signal.alarm(300)  # what hangs is killed
job = json.loads(line)
os.chdir(job["cwd"])
os.environ.clear()
os.environ.update(job["env"])
for number, path in enumerate((os.devnull, "stdout", "stderr")):
    mode = os.O_RDWR if path == os.devnull else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    os.dup2(os.open(os.path.join(job["folder"], path), mode), number)
sys.path[:0] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
sys.argv = job["arguments"]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    what = sys.argv.pop(1)
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """Start the process that is copied, once for all tests of this one. It ends when its standard input does."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER, *PRELOADED]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ...` or `python -m MODULE ...` in a copy, and return its status and what it wrote."""
    process, words = server(), list(map(str, arguments))
    assert words[0] in ("-c", "-m")
    assert process.stdin
    assert process.stdout
    with tempfile.TemporaryDirectory() as folder:
        job = {"arguments": words, "cwd": str(cwd), "env": {**os.environ, **environment}, "folder": folder}
        print(json.dumps(job), file=process.stdin, flush=True)
        status = int(process.stdout.readline())
        stdout, stderr = (Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, status, stdout, stderr)
