PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
NAME ?= cpu-$(shell getconf _NPROCESSORS_ONLN)-cores
unexport PYTHONDONTWRITEBYTECODE # the tests start many processes, each of which would compile every module anew
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal
INTERPRETER := TRITON_INTERPRET=1 PYTHONPATH=tests
INTERPRETED := $(addprefix tests/,test_ops.py test_random_shapes.py test_kernels.py test_cosine_properties.py \
	test_cosine_index.py test_cosine_kernel.py test_resize.py test_resize_properties.py test_standardize.py test_masks.py \
	test_vicreg.py test_vicreg_definitions.py test_vicreg_limits.py test_vicreg_planes.py test_distributed_triton.py \
	test_patches.py::test_is_its_formula_in_value_and_gradient test_tokens.py::test_is_the_formula_in_value_and_gradient)
# Ops with divisions and products of matrices, which have other numbers on a GPU. Derivatives are tested in float64, which
# has the same there.
ON_THE_UNIT := $(addprefix tests/,test_vicreg.py test_vicreg_definitions.py test_vicreg_limits.py test_vicreg_planes.py \
	test_standardize.py test_ops.py) -k "(vicreg or standardize) and not derivatives and not gradients_of_both and not compiles"

.PHONY: help setup demo test test-all test-oldest lint aot bench host results report recipes gpu dist clean

help:  ## what each target does
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

setup: .venv/.dev  ## create .venv with everything that the other targets need

demo: .venv/.demo  ## train a small head on real photographs under a frozen teacher, and show what it learnt (ARGS=...)
	$(BIN)/fused-dino demo $(ARGS)

# The second call proves the kernels in Triton's interpreter, the third with a GPU's numbers: processes of their own.
test: .venv/.dev  ## run the tests, in the interpreter the cases in which every two values meet; a skipped one fails
	$(PYTEST) --no-skips $(ARGS)
	$(INTERPRETER) $(PYTEST) --no-skips -p covering $(INTERPRETED)
	$(INTERPRETER) $(PYTEST) --no-skips -p covering -p matrix_unit $(ON_THE_UNIT)

test-all: .venv/.dev  ## run every case of every test, and compile every kernel for every GPU by the newest compiler
	$(PYTEST) --no-skips $(ARGS)
	$(INTERPRETER) $(PYTEST) --no-skips $(INTERPRETED)
	$(INTERPRETER) $(PYTEST) --no-skips -p matrix_unit $(ON_THE_UNIT)
	$(BIN)/python tests/aot.py

aot: .venv/.dev .venv-oldest/.dev  ## compile every kernel for GPUs that are not here, by both compilers, within its budget (ARGS=...)
	$(BIN)/python tests/aot.py $(ARGS)
	.venv-oldest/bin/python tests/aot.py $(ARGS)

lint: .venv/.dev  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: .venv/.dev  ## time each op against the code that it replaces, by pytest-benchmark (ARGS=--quick)
	$(BIN)/python -m pytest -q benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

results: .venv/.dev  ## measure this machine, keep the evidence in benchmarks/results/, render it (NAME=..., ARGS=...)
	$(BIN)/python -m benchmarks run --self-check --json benchmarks/results/$(NAME).json $(ARGS)
	$(BIN)/python -m benchmarks report

report: .venv/.dev  ## render docs/performance.md, docs/costs.md and the README's table from benchmarks/results/
	$(BIN)/python -m benchmarks report

recipes: .venv/.dev  ## render docs/recipes/ from the recipes' docstrings and costs
	$(BIN)/python -m fused_dino.cli.recipe_pages

host: .venv/.dev  ## what a call costs the host, without a GPU
	$(BIN)/python -m benchmarks.host

gpu: .venv/.dev  ## on a GPU: smoke, tests, memory checkers and benchmarks, into gpu/ (ARGS="--seconds 1800")
	$(BIN)/python -m benchmarks.gpu gpu $(ARGS)

dist: .venv/.dev  ## build the sdist and the wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .

test-oldest: BIN := .venv-oldest/bin
test-oldest: .venv-oldest/.dev  ## run the tests with the oldest torch, Triton, timm and einops that are supported
	$(PYTEST) $(ARGS)
	$(INTERPRETER) $(PYTEST) -p covering $(INTERPRETED)
	$(INTERPRETER) $(PYTEST) -p covering -p matrix_unit $(ON_THE_UNIT)

clean:  ## remove what the other targets made
	rm -rf .venv .venv-oldest build dist *.egg-info demo gpu

# Each stamp is newer than what it was installed from, so that a second call installs nothing.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.demo: .venv/bin/python pyproject.toml setup.py
	@echo "Installing fused_dino and what the demo needs into .venv (some minutes the first time)"
	@test -e .venv/.dev && test ! .venv/.dev -ot pyproject.toml || $(BIN)/python -m pip install -q -e ".[demo]"
	@touch $@

# dinov2 is a published copy of the official code: a test compares with it, and its own requirements are not needed.
.venv/.dev: .venv/bin/python pyproject.toml setup.py
	@echo "Installing fused_dino and what the tests need into .venv (some minutes the first time)"
	@$(BIN)/python -m pip install -q -e ".[dev]"
	@$(BIN)/python -m pip install -q --no-deps dinov2==0.0.1.dev2
	@touch $@

# The interpreter of this torch's Triton 3.6 needs NumPy below 2.4.
.venv-oldest/.dev: pyproject.toml setup.py
	$(PYTHON) -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install -q "torch==2.11.*" timm==1.0.22 einops==0.8.0 "numpy<2.4" -e ".[dev]"
	@.venv-oldest/bin/python -m pip install -q --no-deps dinov2==0.0.1.dev2
	@touch $@
