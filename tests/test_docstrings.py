"""The docstrings of everything public: Google style, the arguments of the signature, examples that run."""

import ast
import builtins
import doctest
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fused_dino
from fused_dino import functional, recipes

METHODS = {
    fused_dino.DinoSupervision: ("forward", "loss_dict", "encode", "check"),
    fused_dino.Supervision: ("forward", "loss_dict"),
    fused_dino.VICRegLoss: ("preset",),
}
PUBLIC = {
    **{f"functional.{name}": getattr(functional, name) for name in functional.__all__},
    **{f"recipes.{name}": getattr(recipes, name) for name in recipes.__all__},
    **{name: getattr(fused_dino, name) for name in fused_dino.__all__ if name not in ("functional", "recipes")},
    **{f"{owner.__name__}.{name}": getattr(owner, name) for owner, names in METHODS.items() for name in names},
}
SECTIONS = ("Args", "Attributes", "Shape", "Returns", "Raises", "Example")
each = pytest.mark.parametrize("name", PUBLIC)


def sections(name):
    """Return {section: its lines}, with "" for what comes before the first section."""
    found, current = {"": []}, ""
    for line in inspect.getdoc(PUBLIC[name]).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            current = line.rstrip(":")
            assert current not in found, f"{current} stands twice"
            found[current] = []
        else:
            found[current].append(line)
    return found


def entries(lines):
    """Return {argument: its description}."""
    found = {}
    for line in lines:
        if match := re.match(r"    (\*{0,2}\w+)(?: \([^)]*\))?: (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return found


@each
def test_the_first_line_is_one_sentence(name):
    summary, blank, *_ = inspect.getdoc(PUBLIC[name]).splitlines()
    assert blank == ""
    assert re.fullmatch(r"[A-Z`].*[^.]\.", summary)
    assert len(summary.split()) <= 25


@each
def test_the_arguments_are_those_of_the_signature_in_its_order(name):
    given = inspect.signature(PUBLIC[name]).parameters.values()
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    expected = [stars.get(p.kind, "") + p.name for p in given if p.name not in ("self", "args")]
    assert list(entries(sections(name).get("Args", []))) == expected


@each
def test_a_default_that_is_said_is_the_signatures(name):
    said = entries(sections(name).get("Args", []))
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        default = re.search(r"Default: (.*?)\.?$", said.get(parameter.name, ""))
        try:
            value = ast.literal_eval(default[1].strip("`")) if default else parameter.default
        except (SyntaxError, ValueError):
            continue  # it is said in words
        assert value == parameter.default, parameter.name


@each
def test_it_tells_of_errors_and_results(name):
    found = sections(name)
    assert {"Returns", "Shape"} & set(found) or name == "use_backend"
    assert entries(found["Raises"]), name
    for error in entries(found["Raises"]):
        assert issubclass(getattr(builtins, error), Exception)


@pytest.mark.parametrize(
    "name", [name for name in PUBLIC if "." not in name or name.startswith(("functional.", "recipes."))]
)
def test_its_example_runs(name):
    """The example knows what its module imports, torch, and the names of the package."""
    thing = PUBLIC[name]
    assert sections(name)["Example"], "there is none"
    known = {
        **vars(sys.modules[thing.__module__]),
        "torch": torch,
        **{x: getattr(fused_dino, x) for x in fused_dino.__all__},
    }
    examples = doctest.DocTestFinder(recurse=False).find(thing, name, globs=known)
    results = [doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example) for example in examples]
    assert sum(result.attempted for result in results) >= 1
    assert sum(result.failed for result in results) == 0


def test_the_supervision_begins_with_an_example():
    assert list(sections("DinoSupervision"))[:2] == ["", "Example"]
    assert len(sections("DinoSupervision")[""]) <= 2


ROOT = Path(__file__).parent.parent
FOLDERS = ("fused_dino", "kernels", "benchmarks", "tests", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))  # rglob follows no links
PREPOSITIONS = {
    *("after", "as", "at", "before", "beside", "between", "by", "for", "from", "in", "into", "of", "on", "over", "per"),
    *("through", "to", "under", "with", "within", "without"),
}


def opens_with_a_preposition(text):
    return re.match(r"\W*(\w*)", text)[1].lower() in PREPOSITIONS


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_docstring_opens_with_a_preposition(path):
    """A docstring begins with what is done, or with the noun that it describes, in private code, too."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    assert [text for text in texts if opens_with_a_preposition(text)] == []


def test_a_preposition_is_seen_behind_marks_and_in_any_case():
    assert all(map(opens_with_a_preposition, ("Of each row.", "by rows", "`In` place", "\n  Without a mask")))
    assert not any(map(opens_with_a_preposition, ("", "Offset of a row.", "Inverse norms.", "Return a row.")))
    assert len(FILES) > 250
