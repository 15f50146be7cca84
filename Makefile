# Two commands need nothing but Python >= 3.11 and make: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
PLAN := .venv-plan
BENCH := .venv-bench

.PHONY: demo test check format lint types fast test-peers test-plan bench-env clean

demo: $(VENV)/.installed
	$(BIN)/sae-jax demo --out demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not peers and not aot"

check: format lint types fast

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check

fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not peers and not aot and not slow"

# Parity with torch and the peer libraries, in an environment of its own: they are large and pin their own versions.
test-peers:
	test -d $(PEERS) || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt "torch==2.13.0" --editable ".[peers]"
	$(PEERS)/bin/python -m pytest -m peers

# The train step compiled for pods and GPU nodes, in an environment of its own: the compilers take 1.3 GB.
test-plan:
	test -d $(PLAN) || $(PYTHON) -m venv $(PLAN)
	$(PLAN)/bin/pip install --quiet --constraint constraints.txt --editable ".[plan,test]"
	JAX_PLATFORMS=cpu $(PLAN)/bin/python -m pytest -m aot

# For experiments/benchmarks/step.py. A torchvision built for another torch, which a peer's own needs may bring, breaks
# the import of transformers; nothing here uses it.
bench-env:
	test -d $(BENCH) || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BENCH)/bin/pip uninstall --quiet --yes torchvision

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(PLAN) $(BENCH) demo build *.egg-info
