# Everything a person or a CI machine runs. `make demo` needs Python >= 3.11 and make, nothing else; `make page` Node.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
# An index for torch alone, such as https://download.pytorch.org/whl/cpu: the CPU build is a tenth of the size.
TORCH_INDEX ?=
SERVE_ARGS ?=
# Test processes: most tests wait for servers to start, which keeps one core busy.
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# What pip would do on one core; some packages ship files that are no Python of this version.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib chatserve kvstore || true
# The ones that need no GPU and no other choice; the rest are described in docs/performance.md.
BENCHMARKS := bench/turn_cost.py bench/sharing.py bench/batching.py bench/store_calls.py bench/frontend.py \
	bench/restart.py bench/scale.py

.PHONY: demo page test check audit soak test-gpu bench clean

demo: $(VENV)/.installed
	$(BIN)/chatserve serve $(SERVE_ARGS)

# Builds web/ into chatserve/static, which is committed: only who changes the page needs Node.
page:
	cd web && npm ci && npm test && npm run build

test: check
	$(BIN)/python -m pytest -q -m "not soak and not gpu" -n $(TEST_WORKERS) --dist loadfile

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	$(BIN)/python .ci/audit.py

audit: $(VENV)/.installed-dev
	$(BIN)/python .ci/audit.py

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m soak --timeout=3600

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m gpu

bench: $(VENV)/.installed-dev
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Where pip is missing (Debian's python3-venv) the interpreter is there all the same, and would pass for a whole environment.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -f $@; exit 1; }

define INSTALL
	@echo "Installing into $(VENV); the first time this downloads torch and takes a few minutes."
	$(if $(TORCH_INDEX),$(PIP) --index-url $(TORCH_INDEX) torch)
	$(PIP) --editable '$(1)'
	$(COMPILE)
endef

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call INSTALL,.)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(call INSTALL,.[dev])
	@touch $(VENV)/.installed $@
