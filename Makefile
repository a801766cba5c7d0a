# Every target sets up what it needs in .venv and can be the first command in a fresh clone.
# PYTHON=... chooses the interpreter of .venv (3.11 or later), JOBS=... the test processes.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
# Not `-m`, which warns: the package has imported the module by then.
CODEGEN := $(BIN)/python -c 'import sys; from fused_adam._codegen import main; sys.exit(main(sys.argv[1:]))'
PIP := -m pip -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-torch check format kernels bench bench-guard ratios figures gpu dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later on PATH; set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra of pyproject.toml; the package itself is installed editable.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/python $(PIP) install --progress-bar off --editable ".[$*]"
	@touch $@

demo: $(VENV)/.demo ## train two networks, draw their loss curves, time a step
	$(BIN)/fused-adam demo

test: $(VENV)/.test ## run the tests
	$(BIN)/python -m pytest -n $(JOBS)

# In an environment of its own, for all else has to pass without these frameworks.
TORCH := build/test-torch
$(TORCH)/.test-torch: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv $(TORCH)
	$(TORCH)/bin/python $(PIP) install --progress-bar off --editable ".[test-torch]"
	@touch $@

test-torch: $(TORCH)/.test-torch ## fused_adam.torch within DDP, FSDP2, Accelerate, Lightning, ...; seven trainings
	$(TORCH)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/torch_frameworks tests/torch_trainings

check: $(VENV)/.dev ## lint, formatting, types, generated files; edits nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(CODEGEN) --check

format: $(VENV)/.dev ## sort imports, mend what ruff can, format
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

kernels: $(VENV)/.dev ## print kernels/rules.cuh anew
	$(CODEGEN)

bench: $(VENV)/.test ## time a step against PyTorch, textbook NumPy and the memory roof; draw it
	$(BIN)/fused-adam bench run --sizes 2^10,2^12,2^14,2^16,2^18,2^20,2^22,2^24,2^25 --timeout 60 \
		--json fused_adam_bench.json --plot fused_adam_bench.png

bench-guard: $(VENV)/.test ## check the speed targets with a margin, on a busy machine too
	$(BIN)/python -m fused_adam.bench.guard

ratios: $(VENV)/.test ## check the CPU speed targets; wants an idle machine
	$(BIN)/python -m fused_adam.bench --ratios

figures: $(VENV)/.test ## write the README's figures from bench/results
	$(BIN)/python -m fused_adam.bench.readme

# Not in .venv: in the interpreter that has CuPy, numba-cuda and PyTorch for this machine's GPU.
gpu: ## with a GPU: bits, speed targets, sanitizer and profile; files go to OUT=bench/results
	$(PYTHON) -m bench.gpu

# The tests run in an environment of the wheel's own, beside nothing but what the sdist says about itself: the
# checkout's packages are left out. So are tests that look at the text of kernels and at what compilers make of it, which
# is the same text, and those whose examples are drawn at random: a third of the time.
DIST := build/dist
SAME := *_sanitizers.py *_compile.py test_numba_cuda*.py test_gpu_*.py test_fuzz.py test_cupy_fuzz.py test_storage_int8.py
dist: $(VENV)/.dev ## sdist, a wheel built from it, and tests of the installed wheel
	rm -rf dist $(DIST)
	mkdir -p $(DIST)/source $(DIST)/empty
	$(BIN)/python -m build --quiet --outdir dist .
	$(BIN)/python -c 'import glob, zipfile; \
		names = zipfile.ZipFile(*glob.glob("dist/*.whl")).namelist(); print(*names, sep="\n"); \
		assert all(n.startswith(("fused_adam/", "fused_adam-")) for n in names), "a foreign top-level name"'
	$(BIN)/python -m venv $(DIST)/venv
	$(DIST)/venv/bin/python $(PIP) install --progress-bar off "$$(ls dist/*.whl)[test]"
	tar -xzf dist/*.tar.gz -C $(DIST)/source --strip-components=1 --no-wildcards-match-slash \
		--exclude='*/fused_adam' --exclude='*/kernels' --exclude='*/bench/*.py' --exclude='*/bench/*/*.py'
	cd $(DIST)/empty && ../venv/bin/python -c 'import sys, fused_adam, fused_adam.bench; \
		print(fused_adam.__file__); \
		assert all(m.__file__.startswith(sys.prefix) for m in (fused_adam, fused_adam.bench)), "not the wheel"'
	cd $(DIST)/empty && ../venv/bin/python -m pytest -n $(JOBS) --config-file=../source/pyproject.toml \
		$(foreach name,$(SAME),--ignore-glob='../source/tests/$(name)') ../source/tests

clean: ## remove everything that make made
	rm -rf $(VENV) build dist fused_adam_demo.png fused_adam_bench.* *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
