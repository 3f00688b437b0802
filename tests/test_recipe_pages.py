"""docs/recipes/: each rendered part is what the code renders now, and the Python runs."""

import re

import pytest
from torch import nn

import fused_dino
from fused_dino import recipes
from fused_dino.cli import recipe_pages
from fused_dino.cli.recipe_pages import BEGIN, END, FOLDER

pytest.importorskip("timm")
each = pytest.mark.parametrize("name", recipes.__all__)


@pytest.fixture(scope="module")
def rendered():
    return recipe_pages.pages()


@pytest.mark.parametrize("name", ["README", *recipes.__all__])
def test_a_page_is_what_make_recipes_would_render(name, rendered):
    path = FOLDER / f"{name}.md"
    text = path.read_text()
    assert recipe_pages.insert(text, rendered[path], path.name) == text, "run make recipes"


def test_each_recipe_has_a_page_and_each_page_a_recipe():
    assert {path.stem for path in FOLDER.glob("*.md")} == {"README", *recipes.__all__}


@each
def test_a_page_says_by_hand_what_the_code_does_not(name):
    text = (FOLDER / f"{name}.md").read_text()
    assert text.startswith("# ")
    by_hand = text.partition(END)[2]
    assert re.findall(r"^## (.*)$", by_hand, re.MULTILINE) == ["The lines that it replaces", "Pitfalls"]
    replaced, pitfalls = by_hand.split("## Pitfalls")
    assert f"recipes.{name}(" in replaced
    assert all(re.search(rf"^\{sign} ", replaced, re.MULTILINE) for sign in "+-")
    assert re.search(r"^- ", pitfalls, re.MULTILINE)


class Layered(nn.Module):
    """A teacher whose last features are those of all its layers."""

    def __init__(self, teacher, layers):
        super().__init__()
        self.teacher, self.layers = teacher, layers
        self.embed_dim, self.patch_size = teacher.embed_dim, teacher.patch_size

    def forward(self, images):
        found = self.teacher(images)
        return {**found, "layers": {n: dict(found) for n in self.layers}}


@each
def test_the_lines_of_use_run(name, teacher, monkeypatch):
    """A small teacher takes DINOv2's place, with which the docstring's example runs in its own test."""
    monkeypatch.setattr(fused_dino, "DINOv2Backbone", lambda *_, layers=(), **options: Layered(teacher, layers))
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / f"{name}.md").read_text(), re.DOTALL)
    assert blocks
    for code in blocks:
        exec(compile(code, f"{name}.md", "exec"), {})


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match=r"x\.md must have a place"):
        recipe_pages.insert(f"# x\n{BEGIN}\n", "text", "x.md")


def test_rendering_writes_every_page(tmp_path, monkeypatch, rendered, capsys):
    monkeypatch.setattr(recipe_pages, "FOLDER", tmp_path)
    for path in rendered:
        (tmp_path / path.name).write_text(f"# by hand\n\n{BEGIN}\n\nold\n\n{END}\n\nalso by hand\n")
    recipe_pages.main()
    for path, text in rendered.items():
        written = (tmp_path / path.name).read_text()
        assert written == f"# by hand\n\n{BEGIN}\n\n{text}\n\n{END}\n\nalso by hand\n"
    assert f"Rendered {len(rendered)} pages" in capsys.readouterr().out
