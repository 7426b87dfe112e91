# make demo | make test | make benchmarks: each makes .venv first, if it is not there or the requirements have changed.
PYTHON ?= python3
BIN := .venv/bin
# Tests run in this many processes: 'make WORKERS=8 test' where there are more cores.
WORKERS ?= 2

.PHONY: demo test benchmarks

demo: .venv/.installed
	$(BIN)/fastadvisor train --amp --approx-meta

test: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

benchmarks: .venv/.installed
	$(BIN)/pytest benchmarks

.venv/.installed: pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: name a Python 3.11 or newer, as in 'make PYTHON=/path/to/python3.11'." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: name a newer one, as in 'make PYTHON=python3.11'." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: install it (Debian, Ubuntu: apt install python3-venv) and run make again." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	@echo "Installing fastadvisor and what it needs into .venv (once; torch is large)."
	@$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev]"
	@touch $@
