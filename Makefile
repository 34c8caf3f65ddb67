# Two commands on a fresh machine (Python 3.11+ and make): `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Two workers of one thread each; the order of files in a worker is that of the folders, and whoever is done takes over what the other has left.
# A worker that dies ends the run: a replaced one is waited for in vain.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -X faulthandler -m pytest \
	-n $(WORKERS) --dist worksteal --max-worker-restart 0 --durations 15

.PHONY: demo test test-all lint types clean

demo: $(READY)
	$(BIN)/edm-deploy demo --out demo

test: lint types
	$(PYTEST)

# Everything: full products of models and recipes, all mutants, every GPU's code; with the coverage of the packages.
test-all: lint types
	$(PYTEST) -m "" -o faulthandler_timeout=3000 --cov --cov-report term:skip-covered

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo build *.egg-info
