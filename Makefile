# make demo and make test need nothing but Python 3.11 or newer; neither a GPU nor the Hub is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# With an NVIDIA driver, the torch of the machine is the one that fits it: no constraint, and the environment
# sees the packages that are installed already. Without one, the constraint keeps the CUDA packages away.
GPU := $(shell if nvidia-smi >/dev/null 2>&1 || test -e /proc/driver/nvidia; then echo yes; fi)
VENV_FLAGS := $(if $(GPU),--system-site-packages)
CONSTRAINT := $(if $(GPU),,-c constraints/cpu.txt)

# "make demo" and "make test" install what they run on, and after that they stay on this machine.
demo test test-slow faults families package: export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow faults families package docs lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.plots ## install, train the demo recipe on any machine and show what was learned
	$(BIN)/qlora-neft train demo --output-dir out/demo-$$(date +%Y%m%d-%H%M%S)

# Tests of a file share what they have trained; files in order, since the slow ones come first.
test: $(VENV)/.dev ## install and run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.dev ## install and run the tests that take more than a minute each
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m slow

faults: $(VENV)/.dev ## break runs in every way at hand and see what is kept (about 20 minutes)
	$(BIN)/python -m scripts.faults

families: $(VENV)/.dev ## train, resume, merge a tiny model of every family, and write its page (about 20 minutes)
	$(BIN)/python -m scripts.families --again

package: $(VENV)/.dev ## build sdist and wheel into dist/, install the wheel in an empty environment, run the demo there
	DIST=dist $(BIN)/python -m pytest -q tests/integration/test_installed_package.py

docs: $(VENV)/.docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/.dev ## check style, formatting and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ty check

format: $(VENV)/.dev ## fix style and formatting
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# The stamp $(VENV)/.EXTRA says that the package is installed with that extra; it is made again when what
# is to be installed has changed.
$(VENV)/.%: pyproject.toml constraints/cpu.txt | $(BIN)/python
	$(BIN)/python -m pip install $(CONSTRAINT) -e ".[$*]"
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
