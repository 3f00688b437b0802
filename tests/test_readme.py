"""The README's Python runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_python_block_runs(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_files_that_it_names_exist():
    named = re.findall(r"\]\(([^)#:]+)\)|`([A-Za-z_/]+\.(?:md|py|png))`", README)
    for name in {a or b for a, b in named}:
        assert (ROOT / name).exists(), name


def test_every_make_target_that_it_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", README, re.MULTILINE))
    assert {a or b for a, b in named} <= targets
    assert len(BLOCKS) >= 3
