# `make demo` and `make test` are the two commands of the README. Both work from a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES := $(or $(OMP_NUM_THREADS),$(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN))
IS_NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test sweep properties mutants lint clean

# torch goes first and alone: the CPU or CUDA build that the pin names, before anything can pull another.
$(VENV)/.installed: requirements.txt setup.cfg pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c '$(IS_NEW_ENOUGH)' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c '$(IS_NEW_ENOUGH)' || \
		{ echo "$(VENV) has an older Python than 3.11: make clean, and again"; exit 1; }
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(BIN)/python -m ensurepip
	grep '^torch==' requirements.txt | $(BIN)/python -m pip install --quiet --requirement /dev/stdin
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

# Without a launcher, which would answer Ctrl-C with a traceback of its own.
demo: $(VENV)/.installed
	OMP_NUM_THREADS=$(CORES) $(BIN)/python train_accelerate.py --recipe demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# What would make `test` too long for every time.
sweep: $(VENV)/.installed-test
	GPT2REPRO_SWEEP=1 $(BIN)/python -m pytest -m sweep --numprocesses auto

# The property tests alone, at random and further than `test` looks.
properties: $(VENV)/.installed-test
	PROPERTY_EXAMPLES=$${PROPERTY_EXAMPLES:-1000} $(BIN)/python -m pytest tests/properties \
		--numprocesses auto --hypothesis-show-statistics

# Mutation testing (setup.cfg, [mutmut]): small faults planted one at a time, 3300 of them, and those
# that no quick test notices listed at the end. No part of CI: at one to three seconds a fault, as
# measured on a core of two that were busy, it takes one to three hours (an estimate). A second run
# goes on from the first. `mutmut show NAME` shows a fault; MUTANTS='gpt2repro.data.rows.order.*' narrows.
mutants: $(VENV)/.installed-test
	$(BIN)/python -m pip install --quiet --editable ".[mutants]"
	mkdir -p mutants
	$(BIN)/python -m mutmut run $(MUTANTS) > mutants/run.log 2>&1 || (tail -n 20 mutants/run.log; false)
	$(BIN)/python -m mutmut results

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build mutants *.egg-info
