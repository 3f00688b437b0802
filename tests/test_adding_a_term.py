"""docs/adding-a-term.md adds a term in one file and one row. The term then has the tests of every other."""

import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import copies
from conftest import TinyTeacher
from fused_dino import Schedule, Supervision, TokenTerm

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/adding-a-term.md").read_text()
BLOCKS = dict(re.findall(r"```py\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
TERM, ROW, USE = "fused_dino/terms/gram.py", "tests/test_terms.py", "use.py"


@pytest.fixture(scope="module")
def gram():
    """Import the term's module, as if its file were in the package."""
    module = ModuleType("fused_dino.terms.gram")
    module.__package__ = "fused_dino.terms"
    exec(compile(BLOCKS[TERM], TERM, "exec"), module.__dict__)
    return module


@pytest.fixture
def tree(tmp_path):
    """A copy of the project with the page's code: new files, and lines at the end of the existing one."""
    for name in ("fused_dino", "kernels", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name, code in BLOCKS.items():
        with (tmp_path / name).open("a") as file:
            file.write(f"\n\n{code}")
    return tmp_path


def python(tree, *arguments):
    return copies.python(*arguments, cwd=tree, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTHONPATH=str(tree))


def given(patch, grid, **more):
    return {"global": patch.mean(1), "patch": patch, "grid": grid, **more}


def test_one_short_file_and_one_row():
    assert list(BLOCKS) == [TERM, ROW, USE]
    assert len(BLOCKS[TERM].splitlines()) < 80
    statements = [line for line in BLOCKS[ROW].splitlines() if line]
    assert [line.split()[0] for line in statements] == ["from", 'TERMS["gram"]']
    assert "pytest" in PAGE
    assert f"{ROW} -k gram" in PAGE


def test_its_numbers_are_those_of_dinov3s_code(gram):
    """DINOv3's GramLoss(apply_norm=True, remove_neg=False) of these tokens in float32, and the norm of its gradient."""
    eps = torch.finfo(torch.float32).eps
    student = torch.tensor([[[1, 0], [1, 1], [0, 2], [-1, 1]]], dtype=torch.float64, requires_grad=True)
    patch = torch.tensor([[[2, 1], [0, 1], [1, 1], [1, -1]]], dtype=torch.float64)
    loss, logs = gram.GramTerm()(student, given(patch, (2, 2)))
    loss.backward()
    assert_close(loss.item(), 0.376844758, rtol=eps, atol=0)
    assert_close(student.grad.norm().item(), 0.432592587, rtol=eps, atol=0)
    assert list(logs) == ["similarity"]


def test_the_teachers_tokens_come_to_the_students_grid(gram):
    torch.manual_seed(0)
    student, patch = torch.randn(2, 6, 5), torch.randn(2, 16, 3)
    maps = patch.mT.reshape(2, 3, 4, 4)
    tokens = F.interpolate(maps, (2, 3), mode="bilinear", align_corners=False).flatten(2).mT
    s, t = (F.normalize(x, dim=-1) for x in (student, tokens))
    expected = (s @ s.mT - t @ t.mT).square().mean()
    for options, more in (({"token_grid": [2, 3]}, {}), ({}, {"image_size": (64, 96)})):
        assert_close(gram.GramTerm()(student, given(patch, (4, 4), **more), **options)[0], expected)


def test_images_of_weight_zero_are_left_out_whatever_they_hold(gram):
    torch.manual_seed(0)
    student, patch = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    one, other = (gram.GramTerm()(student[[i]], given(patch[[i]], (2, 2)))[0] for i in (0, 2))
    student[1] = float("nan")
    student.requires_grad_()
    loss, _ = gram.GramTerm()(student, given(patch, (2, 2)), torch.tensor([1.0, 0.0, 3.0]))
    loss.backward()
    assert_close(loss, (one + 3 * other) / 4)
    assert student.grad.isfinite().all()
    assert (student.grad[1] == 0).all()


def test_what_does_not_fit_is_named(gram):
    term, student = gram.GramTerm(), torch.randn(2, 4, 5)
    term.check("z", student, 2, weight=torch.ones(2))
    for wrong in (student[0], student.long(), student[:1], student[:, 0]):
        with pytest.raises(ValueError, match=r"^z must (be|have)"):
            term.check("z", wrong, 2)
    with pytest.raises(ValueError, match=r"^weight must be of shape \[2\]"):
        term.check("z", student, 2, weight=torch.ones(2, 4))
    with pytest.raises(ValueError, match="needs a teacher with patch tokens"):
        term(student, {"global": torch.randn(2, 5), "patch": None})


def test_it_adds_up_beside_a_term_of_the_package(gram):
    torch.manual_seed(0)
    terms = {"token": TokenTerm(5, weight=0.5), "gram": gram.GramTerm(weight=0.25)}
    supervision = Supervision(TinyTeacher(), terms, Schedule(0.2, 10), img_size=56)
    images, hidden = torch.rand(2, 3, 64, 64), torch.randn(2, 16, 5)
    students = {"token": hidden, "gram": hidden}
    losses = supervision.loss_dict(images, students, step=5)
    assert list(losses) == ["loss_dino", "dino_token", "dino_gram", "dino_gram_similarity"]
    assert_close(losses["loss_dino"], 0.1 * (0.5 * losses["dino_token"] + 0.25 * losses["dino_gram"]))
    with pytest.raises(ValueError, match="weight is given to 'gran'"):
        supervision(images, students, weight={"gran": torch.ones(2)})
    with pytest.raises(ValueError, match=r"^index is given to 'gram'; the terms that take it are token"):
        supervision(images, students, index={"gram": torch.zeros(2, 16, dtype=torch.int64)})


def test_it_compiles_as_one_graph(gram, fresh_compiler):
    torch.manual_seed(0)
    term, student, weight = gram.GramTerm(), torch.randn(2, 6, 5), torch.tensor([1.0, 0.0])
    inputs = given(torch.randn(2, 16, 3), (4, 4), image_size=(64, 96))
    compiled = torch.compile(term, fullgraph=True, backend="aot_eager")
    assert_close(compiled(student, inputs, weight)[0], term(student, inputs, weight)[0])


def test_its_row_has_it_tested_like_every_other(tree):
    run = python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", ROW, "tests/test_layout.py", "-k", "gram")
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 3, run.stdout


def test_a_wrong_term_is_caught(tree):
    file = tree / TERM
    source = file.read_text()
    assert "found.detach()" in source
    file.write_text(source.replace("found.detach()", "found"))
    run = python(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", ROW, "-k", "gram")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed" in run.stdout


def test_its_use_prints_what_the_page_says(tree):
    run = python(tree, "-m", USE.removesuffix(".py"))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == re.search(r"^print\(.*\)  # (.*)$", BLOCKS[USE], re.MULTILINE)[1]
