"""The Python of the README and of docs/ runs, and the links, files and targets that they name exist."""

import re
from pathlib import Path

import pytest

import copies

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FILES = (README, *sorted(ROOT.glob("docs/**/*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}
BLOCKS = [
    pytest.param(code, id=f"{name}-{i}")
    for name, text in PAGES.items()
    if not name.startswith("docs/recipes/")  # test_recipe_pages.py runs those
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
each_page = pytest.mark.parametrize("name", PAGES)


@pytest.mark.parametrize("code", BLOCKS)
def test_every_python_block_runs(code):
    done = copies.python("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def anchors(text):
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@each_page
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^):]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text()), target


@each_page
def test_every_file_that_it_names_exists(name):
    for path in re.findall(
        r"`((?:tests|benchmarks|docs|examples|kernels|ops|reference)/[\w/]+\.(?:md|py|png|json))`", PAGES[name]
    ):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "fused_dino")), path


@each_page
def test_every_make_target_that_it_names_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`", PAGES[name], re.MULTILINE))
    assert {a or b for a, b in named} <= targets


def test_a_newcomer_reads_it_in_three_screens():
    assert len(PAGES["README.md"].splitlines()) <= 130
    assert len(BLOCKS) >= 3
