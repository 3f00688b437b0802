"""How ops are known to torch's caches of compiled graphs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fused_dino.ops.dispatch import digest

PROGRAM = """
import sys
import torch
from torch import Tensor
from fused_dino.ops import dispatch

dispatch.OVERLOAD, rows = sys.argv[1], int(sys.argv[2])

def empty(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(*[rows] * rows)

def fill(out, x):
    out[0].copy_(2 * x)
    out[1].fill_(1)

op = dispatch.launched("probe", empty, fill)
doubled, ones = torch.compile(lambda x: op.overload(x), fullgraph=True)(torch.ones(3))
assert doubled.tolist() == [2, 2, 2]
assert ones.shape == (rows,) * rows, ones.shape
print(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_the_digest_changes_with_the_sources_alone(tmp_path):
    (tmp_path / "a.py").write_text("one")
    first = digest(tmp_path)
    assert first.isidentifier()
    (tmp_path / "notes.txt").write_text("two")
    assert digest(tmp_path) == first
    (tmp_path / "a.py").write_text("two")
    assert digest(tmp_path) != first


@pytest.mark.parametrize("updated", [True, False])
def test_a_graph_that_was_compiled_before_an_update_is_not_taken(tmp_path, updated):
    hits = []
    for overload, rows in [("before", 1), ("after", 2) if updated else ("before", 1)]:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM, overload, str(rows)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        hits.append(int(done.stdout))
    assert hits == [0, 0 if updated else 1]
