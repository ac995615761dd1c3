# Two commands on a fresh machine with Python 3.11 to 3.13, git and make:
#   make run     set up, run the suite (SUITE=mini; its sets from the hub, packages or DATA_ROOT), say what to open next
#   make test    set up, run every check and all tests but the slow ones, which `make test-slow` runs; CI calls both
SUITE ?= mini
# the versions by which the numbers were blessed; `make setup CONSTRAINTS=` installs the newest that pyproject.toml allows
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup constraints run test test-slow test-paper-size coverage oldest test-oldest lint docs check bless ui

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install the suite; nothing when that is current

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@python=$$(for name in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
		$$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$name && break; done); \
	if [ -z "$$python" ]; then echo "error: no Python from 3.11 to 3.13 found; name one with PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "Making $(VENV) with $$($$python --version)"; \
	[ -x $(BIN)/python ] || $$python -m venv $(VENV) || \
		{ echo "error: could not make $(VENV); on Debian install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@echo "Installing the suite, PyTorch and the packages that data and models are in: about three minutes, in which pip says nothing"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[suite,mini,dev]' $(addprefix --constraint ,$(CONSTRAINTS))
	@touch $@
	@echo "Ready. For commands other than make: . $(BIN)/activate"

# by the oldest Python, because the versions have to fit the others too. torch and its CUDA are the machine's
constraints: ## write constraints.txt anew: the newest versions that pyproject.toml allows; minutes
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	python3.11 -m venv "$$folder" && \
	"$$folder/bin/python" -m pip install --quiet --disable-pip-version-check --editable '.[suite,mini,dev,slurm]' && \
	"$$folder/bin/python" -m pip freeze --all --exclude-editable > "$$folder/installed.txt" && \
	grep '^#' constraints.txt > "$$folder/constraints.txt" && \
	grep -vE '^(pip|torch|torchvision|triton|(nvidia|cuda)-.*)==' "$$folder/installed.txt" | \
		tr 'A-Z_' 'a-z-' | LC_ALL=C sort >> "$$folder/constraints.txt" && \
	cp "$$folder/constraints.txt" constraints.txt

SUITE_CONFIG = $(strip suite=$(SUITE) $(if $(SEEDS),seeds=$(SEEDS)) $(if $(DATA_ROOT),data_root=$(DATA_ROOT)))
# `status` and `check` expect the runs of these seeds only
ifdef SEEDS
WITH_SEEDS = EMOE_OVERRIDES='{"suite": "$(SUITE)", "seeds": $(SEEDS)}'
endif
run: $(STAMP) ## run a suite: make run, make run SUITE=smoke, make run SUITE=full SEEDS=2 DATA_ROOT=/folder/of/sets
	@echo "Running the suite '$(SUITE)': snakemake --cores all --config $(SUITE_CONFIG)"
	@$(BIN)/snakemake --cores all --quiet reason host rules --config $(SUITE_CONFIG)
	@echo
	@$(WITH_SEEDS) $(BIN)/python -m benchmarks status --suite $(SUITE)

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: lint ## every check, and all tests but the slow ones
	@echo "Running the tests"
	@$(PYTEST) -m "not slow and not paper_size"

test-slow: $(STAMP) ## the slow tests: whole suites and runs, killed and resumed, several processes, compilers, a browser
	@echo "Running the slow tests"
	@$(PYTEST) -m "slow and not paper_size"

coverage: $(STAMP) ## lines and branches that no test runs; fails where the library has more than 5 %, the benchmarks more than 10 %
	@$(BIN)/coverage erase
	@$(BIN)/coverage run -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report --include 'emoe/*' --fail-under 95
	@$(BIN)/coverage report --include 'benchmarks/*' --fail-under 90

OLDEST := .venv-oldest
oldest: $(OLDEST)/.installed

$(OLDEST)/.installed: pyproject.toml tests/oldest.txt $(STAMP)
	@echo "Setting up $(OLDEST) with the oldest versions that are allowed"
	@$(BIN)/python -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[suite,mini,dev,quantized]' --constraint tests/oldest.txt
	@touch $@

# timm's own loader fails in its oldest releases on folders with several safetensors files
test-oldest: $(OLDEST)/.installed ## the library's contract with the oldest versions of torch, transformers, peft, accelerate
	@$(OLDEST)/bin/python -m pytest -n 2 -q tests/contract tests/golden tests/unit/test_docs.py --ignore tests/contract/test_several_processes.py \
		-k 'not (checkpoint_loads_with_emoe and (VisionTransformer or Beit or SwinTransformer))'

test-paper-size: $(STAMP) ## the paper's suite at its size: all runs' graph and tables with made-up results, and a trial of each pipeline; needs many GB of disk and memory
	@$(BIN)/python -m pytest -m paper_size tests/workflow/test_paper_size.py tests/workflow/test_paper_trial.py

lint: $(STAMP) ## style, types, imports between rooms, workflow style
	@echo "Checking style, types and workflow"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --num-workers 2
	@$(BIN)/lint-imports --no-logo --no-cache
	@$(BIN)/snakefmt --check Snakefile workflow
	@$(BIN)/snakemake --lint

docs: $(STAMP) ## write the documentation as a site, site/index.html
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "Documentation: site/index.html"

check: $(STAMP) ## compare a suite's numbers with the blessed ones: make check SUITE=full SEEDS=2
	@$(WITH_SEEDS) $(BIN)/python -m benchmarks check --suite $(SUITE)

bless: $(STAMP) ## make a suite's present numbers the blessed ones
	@$(BIN)/python -m benchmarks bless --suite $(SUITE)

ui: $(STAMP) ## open the MLflow UI on the mirrored runs, and print the links to them
	@$(BIN)/python -m benchmarks ui --suite $(SUITE)
