# `make demo` and `make test` do all the set-up they need; a second run installs nothing.
# PYTHON is the interpreter, OUT the folder of the demo, DEMO_ARGS are further options of the demo (such as --full --seeds 3),
# MODEL, DATA and LABELS of `make real`: the start model (folder or hub id), a folder with the data (empty: the hub), people's labels.
# BENCH_ARGS further options of the benchmarks of training and generation (such as --threads 8), BENCH_MODEL a folder with a chat model and
# BENCH_PAIRS a file of pairs, for the benchmark of a real model, and BENCH_BFLOAT16=1 its training in bfloat16 too.
# BENCH_PREPARE_ARGS are those of `prepare` (--data FILE --before COMMIT).
# HASHES=1 lets `demo` and `test` install only what has a hash in requirements-hashed.txt. TESTS are the test files (empty: all), PYTHONS those
# of test-pythons. PINS= with a VENV of its own installs the newest versions in place of those of constraints.txt (torch excepted).
# AUDIT_ARGS are further options of pip-audit (such as --vulnerability-service osv --osv-url URL).

PYTHON ?= python3
OUT ?= runs/demo
DEMO_ARGS ?=
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
DATA ?=
LABELS ?=
REAL_OUT ?= runs/real
BENCH_ARGS ?=
BENCH_MODEL ?=
BENCH_PAIRS ?=
BENCH_BFLOAT16 ?=
BENCH_PREPARE_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile
HASHES ?=
TESTS ?=
PYTHONS ?= 3.10 3.11 3.12 3.13
AUDIT_ARGS ?=
KEEP ?=
PINS ?= -c constraints.txt

VENV := .venv
BIN := $(VENV)/bin
# pip's warnings are hidden, its errors are shown. Bytecode is compiled at the first import, and only for imported modules.
PIP := -m pip install -qq --no-compile --disable-pip-version-check --no-input
PIP_INSTALL := $(BIN)/python $(PIP) $(PINS)
# pip takes hashes for all packages or for none, and none for a folder: with them, the packages come first, then bfpo alone. What was
# installed without them is installed again, so their stamps have names of their own.
TORCH := $(if $(HASHES),--force-reinstall --require-hashes -r requirements-hashed.txt,-c constraints.txt torch)
BFPO := $(if $(HASHES),--no-deps --no-build-isolation)
RUNTIME := $(VENV)/.runtime$(if $(HASHES),-hashed)
DEV := $(VENV)/.dev$(if $(HASHES),-hashed)
# Without the bytecode every process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
NO_PIP = { echo "error: the packages could not be installed (see above); if $(VENV) is broken: make clean-venv" >&2; exit 1; }

.PHONY: help demo picture real bench bench-quick docs test test-all test-trl test-lowest test-pythons test-wheel audit hashes lint types \
	imports tests format setup clean-venv
.DEFAULT_GOAL := help

help:
	@echo "make demo      train, align and compare small models on this machine; the page is $(OUT)/report.html"
	@echo "make picture   run the full demo with three seeds and make the picture of README.md from it"
	@echo "make real      train a real chat model to decline harmful requests (MODEL=..., DATA=...); the page is $(REAL_OUT)/report.html"
	@echo "make test      lint, types, import rules and tests"
	@echo "make test-all  the same and the slow tests"
	@echo "make test-pythons  the tests on Python $(PYTHONS), lowest and pinned versions (TESTS=tests/objective: a part of them)"
	@echo "make test-wheel    build sdist and wheel, and run the demo from an environment with the wheel alone"
	@echo "make audit     known vulnerabilities of what is installed;  make hashes  write requirements-hashed.txt"
	@echo "make docs      build the documentation into site/, links checked; open site/index.html"
	@echo "make bench     measure training against TRL, its scaling, the ramp-up and generation; bench-quick checks that it runs"
	@echo "make format    format the code"

demo: $(RUNTIME)
	$(BIN)/bfpo demo --out $(OUT) --resume $(DEMO_ARGS)

# The picture of README.md: the figure of the full demo with three seeds.
picture: $(RUNTIME)
	$(BIN)/bfpo demo --out runs/picture --resume --full --seeds 3
	cp runs/picture/figures/scatter.png docs/images/demo.png

# An hour or more on two cores; a finished stage is skipped, so that it can be interrupted. See docs/real-model.md.
real: $(RUNTIME)
	MODEL="$(MODEL)" DATA="$(DATA)" LABELS="$(LABELS)" OUT="$(REAL_OUT)" BFPO=$(BIN)/bfpo PYTHON=$(BIN)/python recipes/smollm2-135m/run.sh

# Shows the tables and writes them, with the figure, into docs/performance.md.
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.throughput $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.sft $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.hot_path $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.scaling $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.rampup $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.generation $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.prepare $(BENCH_PREPARE_ARGS)
	$(BIN)/python -m benchmarks.balance
	$(if $(BENCH_MODEL),$(BIN)/python -m benchmarks.sft --models "$(BENCH_MODEL)" --append $(BENCH_ARGS))
	$(if $(BENCH_MODEL),$(BIN)/python -m benchmarks.real --model "$(BENCH_MODEL)" --pairs "$(BENCH_PAIRS)" $(BENCH_ARGS))
	$(if $(BENCH_BFLOAT16),$(BIN)/python -m benchmarks.sft --models "$(BENCH_MODEL)" --dtype bfloat16 $(BENCH_ARGS))
	$(if $(BENCH_BFLOAT16),$(BIN)/python -m benchmarks.real --model "$(BENCH_MODEL)" --pairs "$(BENCH_PAIRS)" --work training --dtype bfloat16 $(BENCH_ARGS))
	$(BIN)/python -m benchmarks.report

# Tiny sizes, to check that everything runs; results are written only to runs/.
bench-quick: $(VENV)/.bench
	$(BIN)/python -m benchmarks.throughput --quick --out runs/bench-quick $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.sft --quick --out runs/bench-quick $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.hot_path --quick --out runs/bench-quick $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.scaling --quick --out runs/bench-quick $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.rampup --quick --out runs/bench-quick $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.generation --quick --out runs/bench-quick $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.prepare --quick --out runs/bench-quick
	$(BIN)/python -m benchmarks.balance --quick --out runs/bench-quick

# Links, anchors and the navigation are checked; the pages of commands, keys and the Python API are made of the code.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: site/index.html"

test: lint types imports tests

# Some tests need TRL, bitsandbytes, lm-eval, Inspect, alpaca-eval, Ray, DeepSpeed, trackers, Jupyter and a browser (Debian: chromium); where one is missing they are skipped.
test-all: lint types imports $(DEV) $(VENV)/.bench $(VENV)/.quant $(VENV)/.evidence
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS) -m "not gpu"

# The trainer on TRL, whose releases change: CI runs this apart and says loudly if it fails, without stopping.
test-trl: $(DEV) $(VENV)/.bench
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/integrations

# Tests with the lowest supported versions of the dependencies, in a separate environment.
test-lowest: $(VENV)/.made
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install -qq -r constraints-lowest.txt
	$(VENV)-lowest/bin/python -m pip install -qq -c constraints-lowest.txt -e . pytest pytest-xdist hypothesis import-linter jsonschema
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest $(PYTEST_ARGS) $(TESTS)

# An interpreter is one of the PATH or of pyenv. Its environment is removed after its tests (KEEP=1 keeps it): outside a CPU index torch is
# about 3 GB of CUDA libraries. The lowest versions run on the first Python, for which all of them have wheels.
test-pythons:
	@lowest=test-lowest; tested=; missing=; failed=; for version in $(PYTHONS); do \
		python=; for one in python$$version $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python; do \
			"$$one" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null && python=$$one && break; \
		done; \
		if [ -z "$$python" ]; then missing="$$missing $$version"; continue; fi; \
		tested="$$tested $$version"; for target in test $$lowest; do \
			echo "Python $$version: make $$target"; \
			$(MAKE) --no-print-directory $$target VENV=$(VENV)-$$version PYTHON="$$python" || failed="$$failed $$version($$target)"; \
		done; \
		lowest=; [ -n "$(KEEP)" ] || rm -rf $(VENV)-$$version $(VENV)-$$version-lowest; \
	done; \
	[ -z "$$missing" ] || echo "not installed here, not tested: Python$$missing"; \
	[ -n "$$tested" ] || { echo "error: nothing was tested" >&2; exit 1; }; \
	set -- $$tested; echo "tested: Python$$tested; the lowest versions of the packages on $$1 alone"; \
	[ -z "$$failed" ] || { echo "error: failed on Python$$failed" >&2; exit 1; }

# The wheel is built from the sdist. tests/installed.py names all that it checks.
test-wheel: $(VENV)/.made
	rm -rf dist $(VENV)-wheel
	$(BIN)/python $(PIP) build
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python $(PIP) -c constraints.txt torch
	$(VENV)-wheel/bin/python $(PIP) -c constraints.txt dist/bfpo-*.whl
	$(VENV)-wheel/bin/python tests/installed.py

# Asks the registry about each installed package; one that it does not know fails the audit, too. torch may be a local build.
audit: $(DEV)
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python $(PIP) pip-audit
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > $(VENV)-audit/installed.txt
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip $(AUDIT_ARGS) -r $(VENV)-audit/installed.txt

# The whole set of packages behind `make demo` and `make test`, for every Python and system, at the versions of constraints.txt.
hashes:
	printf 'hatchling\neditables\n' | uv pip compile --quiet --universal --python-version 3.10 --no-annotate --generate-hashes \
		--custom-compile-command "make hashes" -c constraints.txt --extra dev pyproject.toml - -o requirements-hashed.txt

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(DEV)
	$(BIN)/mypy

imports: $(DEV)
	$(BIN)/lint-imports

tests: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PYTEST_ARGS) $(TESTS)

format: $(DEV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

setup: $(DEV)

clean-venv:
	rm -rf $(VENV)

# A virtual environment whose creation was interrupted has no working pip and is created again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: bfpo needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." \
			"Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "creating $(VENV) with $$($(PYTHON) --version)"; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
			echo "error: the virtual environment could not be created; on Debian or Ubuntu: apt-get install python3-venv" >&2; \
			exit 1; }; \
	fi
	@touch $@

# torch is installed first, at the version pinned in constraints.txt: a newer one may bring gigabytes that are not needed here.
$(VENV)/.torch$(if $(HASHES),-hashed): $(VENV)/.made constraints.txt $(if $(HASHES),requirements-hashed.txt)
	@echo "installing torch (the longest part)"
	@$(BIN)/python $(PIP) $(TORCH) || $(NO_PIP)
	@touch $@

$(RUNTIME): $(VENV)/.torch$(if $(HASHES),-hashed) pyproject.toml
	@echo "installing bfpo and its dependencies"
	@$(PIP_INSTALL) $(BFPO) -e . || $(NO_PIP)
	@touch $@

$(DEV): $(RUNTIME)
	@echo "installing the development tools"
	@$(PIP_INSTALL) $(BFPO) -e ".[dev]" || $(NO_PIP)
	@touch $@

$(VENV)/.docs: $(RUNTIME)
	@echo "installing mkdocs"
	@$(PIP_INSTALL) -e ".[docs]" || $(NO_PIP)
	@touch $@

$(VENV)/.bench: $(RUNTIME)
	@echo "installing TRL for the benchmarks"
	@$(PIP_INSTALL) -e ".[bench]" || $(NO_PIP)
	@touch $@

$(VENV)/.quant: $(RUNTIME)
	@echo "installing bitsandbytes for four-bit weights"
	@$(PIP_INSTALL) -e ".[quant]" || $(NO_PIP)
	@touch $@

$(VENV)/.evidence: $(RUNTIME)
	@echo "installing lm-eval, Inspect, alpaca-eval, browser automation, Ray, DeepSpeed, the trackers and Jupyter kernels"
	@$(PIP_INSTALL) -e ".[lm-eval,inspect,alpaca-eval,browser,ray,deepspeed,mlflow,trackio,wandb,notebooks]" || $(NO_PIP)
	@touch $@
