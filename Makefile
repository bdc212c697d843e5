# make demo        compare normalizations on handwritten digits: a sentence, a table, a report
# make demo-keras  the classic Keras CNN with and without batch normalization, and a trap: a table, a picture
# make test        lint, types and tests, with the time of each area
# make test-pure   tests of PyTorch's layers as if no C++ compiler had been there
# make test-all    the same, and the tests marked long
# make bench       the speed of norms beside PyTorch, JAX and Keras, on a machine that does nothing else: docs/performance.md
# make bench-page  that page again, from the rows that are there
# make calibrate   whether studies reach the same verdict with other seeds: benchmarks/studies.csv
# make sanitize    the compiled kernels under the address and undefined sanitizers: minutes, of which most are compiling
# make format      rewrite the code in its own style

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-keras test test-all test-pure check sanitize bench bench-page calibrate format clean

demo: $(READY)
	$(BIN)/normkit compare cnn --data digits

demo-keras: $(READY)
	$(BIN)/python examples/keras_mnist_cnn.py

test: check
	$(BIN)/python -m pytest -m "not long"

test-pure: $(READY)
	$(BIN)/python -m pytest -m "not long" --without-kernels tests/kernels tests/torch tests/conformance

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

calibrate: $(READY)
	$(BIN)/python benchmarks/studies.py all --repeats 3

# The instruction sets of CMakeLists.txt.
SANITIZE := -std=gnu++17 -O1 -g -fopenmp -fno-math-errno -fno-trapping-math -Wno-psabi -Isrc/normkit/csrc \
  -fsanitize=address,undefined -fno-sanitize-recover=all
FLAGS_baseline :=
FLAGS_avx2 := -mavx2 -mfma
FLAGS_avx512 := -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512
SETS := baseline $(if $(filter x86_64 amd64,$(shell uname -m)),avx2 avx512)

build/sanitize/%.o: src/normkit/csrc/kernels.cpp $(wildcard src/normkit/csrc/*.hpp)
	mkdir -p build/sanitize
	$(CXX) $(SANITIZE) $(FLAGS_$*) -DNORMKIT_TABLE=table_$* -DNORMKIT_NAME=$* -c $< -o $@

build/sanitize/kernels: tests/kernels/sanitize.cpp $(SETS:%=build/sanitize/%.o)
	$(CXX) $(SANITIZE) $(if $(filter avx2,$(SETS)),-DNORMKIT_X86) $^ -o $@

sanitize: build/sanitize/kernels
	$<

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/normkit/csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build normkit-report
