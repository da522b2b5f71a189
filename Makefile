# Two commands, each of which sets up all it needs: `make reproduce` and `make test`.
# Another Python beside the first: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: reproduce test figures
.DEFAULT_GOAL := reproduce

# built anew whenever requirements.txt is newer; an interrupted set-up leaves no stamp and is redone
# uv takes a third of pip's time; it reads no pip.conf, so that a mirror named there alone needs pip. Compiled once here,
# packages are not compiled by every process that may not write them
$(VENV)/.complete: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python $${PIP_CONSTRAINT:+--constraint "$$PIP_CONSTRAINT"} \
	  $${PIP_INDEX_URL:+--default-index "$$PIP_INDEX_URL"} -r requirements.txt \
	  || { echo "uv failed, see above; pip, which is slower, installs instead"; $(PIP) -r requirements.txt; }
	touch $@

reproduce: $(VENV)/.complete
	$(BIN)/python scripts/reproduce.py

test: $(VENV)/.complete
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist=worksteal

# README's and REPORT's tables and figures, from the logs under results/
figures: $(VENV)/.complete
	$(BIN)/python scripts/report.py
