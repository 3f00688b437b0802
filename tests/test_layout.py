"""The layout: who may import whom, what an import costs, and what is packaged."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fused_dino"

# A module or folder of the package, and those that it may import.
ARROWS = {
    "validation": set(),
    "hidden": set(),
    "counting": set(),
    "costs": {"counting", "losses", "sizes", "teacher", "terms"},
    "gpus": set(),
    "kernels": set(),
    "live": {"reference"},
    "reference": set(),
    "registry": {"ops", "reference"},
    "backend": {"registry", "ops"},
    "distributed": set(),
    "ops": {"kernels", "reference", "distributed"},
    "rows": {"reference", "backend", "ops", "validation"},
    "vicreg": {"reference", "backend", "distributed", "validation"},
    "functional": {"rows", "vicreg", "backend", "validation"},
    "preprocess": {"functional", "backend", "validation"},
    "losses": {"functional", "distributed", "hidden", "rows", "registry", "backend", "validation"},
    "features": {"validation"},
    "sizes": {"validation"},
    "schedule": {"distributed", "validation"},
    "teacher": {"backend", "hidden", "live", "preprocess", "features", "sizes", "validation"},
    "terms": {
        "functional",
        "hidden",
        "live",
        "losses",
        "ops",
        "reference",
        "registry",
        "rows",
        "features",
        "validation",
    },
    "legacy_checkpoint": set(),
    "calls": {"terms"},
    "supervised": {"legacy_checkpoint", "live", "schedule", "teacher", "terms", "validation"},
    "supervision": {"calls", "distributed", "functional", "schedule", "sizes", "supervised", "terms", "validation"},
    "recipes": {
        "calls",
        "distributed",
        "features",
        "functional",
        "legacy_checkpoint",
        "losses",
        "schedule",
        "sizes",
        "supervised",
        "supervision",
        "teacher",
        "terms",
        "validation",
    },
    "benchmarks": {"", "costs", "counting", "functional", "gpus", "ops", "reference", "teacher"},
    "cli": {
        "",
        "backend",
        "benchmarks",
        "costs",
        "functional",
        "gpus",
        "recipes",
        "registry",
        "sizes",
        "supervision",
        "teacher",
    },
    "integrations": {"", "supervision"},
    "__main__": {"cli"},
    "": {
        "functional",
        "backend",
        "losses",
        "preprocess",
        "recipes",
        "schedule",
        "sizes",
        "supervision",
        "teacher",
        "terms",
    },
}
# Other packages that a module may import; modules that are not listed import what they need.
OUTSIDE = {"kernels": {"triton"}, "reference": {"torch", "einops"}}


def part(path: Path) -> str:
    """Return the module or folder of the package that a file belongs to."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> set[str]:
    """Return the absolute dotted names of the modules that a file imports, wherever in it."""
    package = ["fused_dino", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            inside = PACKAGE.joinpath(*stem.split(".")[1:])
            folder = stem.split(".")[0] == "fused_dino" and inside.is_dir()
            for alias in node.names:
                below = folder and ((inside / f"{alias.name}.py").exists() or (inside / alias.name).is_dir())
                names.add(f"{stem}.{alias.name}" if below else stem)
    return names


# rglob follows no links
FOLDERS = (PACKAGE, PACKAGE / "kernels", PACKAGE / "benchmarks")
FILES = sorted(p for folder in FOLDERS for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = part(path)
    assert here in ARROWS, f"ARROWS does not list {here}"
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "fused_dino":
            there = rest.split(".")[0]
            assert there == here or there in ARROWS[here], f"{here or '__init__'} must not import {name}"
        elif here in OUTSIDE and top not in sys.stdlib_module_names:
            assert top in OUTSIDE[here], f"{here} must not import {name}"


def test_the_test_of_imports_sees_a_wrong_arrow(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "fused_dino")
    (tmp_path / "fused_dino/reference").mkdir(parents=True)
    (tmp_path / "fused_dino/ops").mkdir()
    wrong = tmp_path / "fused_dino/reference/cosine.py"
    wrong.write_text("def f():\n    from .. import ops\n    from ..ops.cosine import g\n    import timm\n")
    assert imports(wrong) == {"fused_dino.ops", "fused_dino.ops.cosine", "timm"}
    assert part(wrong) == "reference"


def test_no_test_knows_an_op_by_its_name():
    """A fact of an op is a field of its row in tests/table/."""
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = [ast.unparse(side) for side in (node.left, *node.comparators)]
                assert "op.name" not in compared, f"{path.name}, line {node.lineno}"


def test_the_kernels_folder_is_a_link_without_init():
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels/__init__.py").exists()


def test_the_benchmarks_folder_is_a_link():
    link = PACKAGE / "benchmarks"
    assert link.is_symlink()
    assert link.resolve() == ROOT / "benchmarks"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("test_*.py")), ids=lambda p: p.name)
def test_an_op_joins_the_benchmarks_with_one_short_file(path):
    assert len(path.read_text().splitlines()) < 80
    assert "pytest" not in path.read_text()


def test_the_package_exports_from_a_short_file():
    assert len((PACKAGE / "__init__.py").read_text().splitlines()) < 30


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    """Return the stdout of a fresh interpreter, which must write nothing to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={"PATH": "", **environment}
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("blocked", [False, True])
def test_import_needs_neither_triton_nor_timm_and_says_nothing(blocked):
    code = f"""
blocked = {blocked}
import sys, time
import torch
before = set(sys.modules)
for name in ("triton", "timm", "torchvision", "rich", "matplotlib"):
    if blocked and name not in before: sys.modules[name] = None
start = time.perf_counter()
import fused_dino
from fused_dino import functional as FD
assert FD.cosine_loss(torch.ones(2, 3), torch.ones(2, 3)).item() < 1e-6
assert not {{name.partition(".")[0] for name in set(sys.modules) - before if sys.modules[name]}} & {{"triton", "timm"}}
print(time.perf_counter() - start)
"""
    assert float(python(code)) < 5, "beyond torch itself there is little to import"


def test_a_package_named_kernels_is_not_shadowed(tmp_path):
    """Hugging Face's package of that name must win over our folder, also for a user who works in the root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("theirs = True")
    assert python("import kernels; print(kernels.theirs)", PYTHONPATH=str(tmp_path)) == "True"


def build(tmp_path: Path) -> tuple[Path, Path]:
    """Build an sdist of the tree, and a wheel from the sdist."""
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    return sdist, wheel


def test_the_wheel_and_the_sdist(tmp_path):
    pytest.importorskip("build")
    sdist, wheel = build(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fused_dino"}
    assert {f"fused_dino/benchmarks/{p.name}" for p in (ROOT / "benchmarks").glob("*.py")} <= set(names)
    assert not [name for name in names if "results" in name]
    assert {"fused_dino/py.typed", "fused_dino/kernels/README.md"} <= set(names)
    assert {f"fused_dino/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")} <= set(names)
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"kernels/README.md", "setup.py", "LICENSE", "tests/conftest.py", "benchmarks/harness.py"} <= inside
    assert "examples/align_tokens.py" in inside
    code = """
import sys, fused_dino, fused_dino.kernels, torch
assert "fused_dino.benchmarks" not in sys.modules
from fused_dino.benchmarks import harness
assert "cosine_loss" in harness.benches()
print(fused_dino.__file__, fused_dino.__version__)
fused_dino.Preprocess(14)(torch.zeros(1, 3, 8, 8))
"""
    out = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert out.startswith(str(tmp_path / "site"))
