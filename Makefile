# Everything runs in .venv, which `make setup` makes from the pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process a core, each with a thread of its own; the GPU's tests follow, one at a time, for they
# share its memory.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test setup weights lint clean

demo: setup
	$(BIN)/python -m lmexp

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --ignore tests/gpu --cov --cov-report= \
	  --numprocesses logical --maxprocesses 8 --dist worksteal
	$(PYTEST) tests/gpu --cov --cov-append --cov-fail-under=90

setup: $(VENV)/.complete weights

$(VENV)/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lmexp needs Python 3.11 or newer; name one: make PYTHON=python3.12 setup"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	touch $@

weights:
	$(BIN)/python -m lmexp.weights fetch mobile_stylegan_ffhq stlpips_alex sface dlib_identity dlib_landmarks_68

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
