# make demo        compare normalizations on handwritten digits: a sentence, a table, a report
# make demo-keras  the classic Keras CNN with and without batch normalization, and a trap: a table, a picture
# make test        lint, types and tests, with the time of each area
# make test-all    the same, and the tests marked long
# make bench       the speed of norms beside PyTorch, JAX and Keras, on a machine that does nothing else: docs/performance.md
# make bench-page  that page again, from the rows that are there
# make format      rewrite the code in its own style

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-keras test test-all check bench bench-page format clean

demo: $(READY)
	$(BIN)/normkit compare cnn --data digits

demo-keras: $(READY)
	$(BIN)/python examples/keras_mnist_cnn.py

test: check
	$(BIN)/python -m pytest -m "not long"

test-all: check
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/normkit bench --csv benchmarks/performance.csv --page docs/performance.md

bench-page: $(READY)
	$(BIN)/normkit bench --from benchmarks/performance.csv --page docs/performance.md

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/normkit/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build normkit-report
