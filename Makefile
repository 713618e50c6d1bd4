# make train   the whole way: environment, data, training, evaluation
# make test    the same environment, then every test that needs nothing else and takes seconds
# make test-cluster   tests on a SLURM cluster of two nodes and two hosts on this machine, DeepSpeed, kills and what else takes
#                     long; root gets missing Debian packages installed
# make test-page   the page of `serve` in a headless Chromium, which must be there, and the pictures of it in docs/results
# make test-gpu    what a GPU computes, on the GPUs that there are; without any in a reduced form on the CPU
# make bench-gpu   what a GPU does in a second, written to docs/results/gpu.md; likewise
#                  Both take .venv or, where there is none, PYTHON with this package's dependencies and pytest; they read nothing
#                  from the network, leave out with a reason what is not installed, and end within ten minutes
# make setup   the environment alone, made or brought up to date
# make bench   speed, against what one would use otherwise
# make lint    style, docstrings and types; make clean removes the environment, not the runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/mnist5k-eae
INSTALLED := $(VENV)/.installed
SHARDS := shards/mnist5k/index.json
CLUSTER_TESTS := tests/slurm tests/cluster
GPU_TESTS := tests/test_gpu.py tests/latent/test_gpu_search.py
AS_IT_IS = timeout --signal=INT --kill-after=20s 570s $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# GPUs where torch sees any, else two CPU ranks.
LAUNCH = $(BIN)/accelerate launch $(shell $(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--config_file launch/cpu.yaml')")

.PHONY: train test test-cluster test-page test-gpu setup bench bench-gpu lint clean

train: $(INSTALLED) $(SHARDS)
	$(LAUNCH) -m eae_dist.train
	$(BIN)/python -m eae_dist.evaluate --ckpt $(RUN)
	@echo
	@echo "pictures: $(RUN)/evaluation/*.png and, as they came, $(RUN)/samples/*.png"
	@echo "numbers:  $(RUN)/evaluation/metrics.json, $(RUN)/metrics.jsonl, and: $(BIN)/tensorboard --logdir $(RUN)"

# Two workers: one runs every test of the launches of several ranks (tests/conftest.py).
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# Interrupted rather than ended after forty minutes, so that the daemons end too.
test-cluster: $(INSTALLED)
	tests/slurm/install.sh
	timeout --signal=INT 40m sh -c '$(BIN)/python -m pytest -n 2 --dist loadgroup $(CLUSTER_TESTS) && $(BIN)/python -m pytest -n 2 --dist loadgroup -m slow'

test-page: $(INSTALLED) $(SHARDS)
	$(BIN)/python -m pip install --quiet -e '.[page]'
	$(BIN)/python -m pytest -rs tests/ui

lint: $(INSTALLED)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks

test-gpu:
	$(AS_IT_IS) -m pytest -m gpu -rs $(GPU_TESTS)

bench-gpu:
	$(AS_IT_IS) -m benchmarks.gpu

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(BIN)/python -m ensurepip 2> /dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(SHARDS): | $(INSTALLED)
	$(BIN)/python -m eae_dist.pack mnist5k shards/mnist5k

clean:
	rm -rf $(VENV)
