# The two commands of a fresh machine are `make run` and `make test`; both set everything up first.
# Needs Python 3.11 or newer, make and a C++ compiler.

PYTHON ?= python3
VENV ?= .venv
ARGS ?= recipe=chinese_llama stage=2
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: run test test-ray test-rest soak bench lint format setup clean

run: setup
	$(BIN)/python launch/run.py $(ARGS)

# Tests that start Ray one after the other and the rest beside them; then alone those that measure seconds against a promise.
test: setup lint
	$(MAKE) --no-print-directory --jobs=2 test-ray test-rest
	$(BIN)/python -m pytest -m timed

test-ray:
	$(BIN)/python -m pytest -m "ray and not timed and not gpu and not soak"

test-rest:
	$(BIN)/python -m pytest -m "not ray and not timed and not gpu and not soak"

# Fifty kills of a run of two hundred steps; a quarter of an hour.
soak: setup
	$(BIN)/python -m pytest -m soak tests/soak

# The stages against the Hugging Face Trainer, and what checkpoints cost; half an hour on a machine that does nothing else.
bench: setup
	$(BIN)/python -m tests.bench.against_reference --out docs/bench
	$(BIN)/python -m tests.bench.checkpoint_overhead
	$(BIN)/python -m tests.bench.preparation

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || \
		{ echo "A C++ compiler is needed: DeepSpeed builds a small op for training on CPU (Debian: apt install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
