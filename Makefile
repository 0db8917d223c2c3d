# Each target sets up what it needs in .venv on first use.
#
#   make picture PROMPT="a red apple"    a picture in picture.png; OUT= and ARGS= may be set
#   make test                            the test suite
#   make lint                            formatting, lint and types
#   make bench                           this machine, beside diffusers and OpenVINO: a quarter of an hour
#   make soak                            what the server promises, at full size: an hour
#   make evaluate                       the model that ships, judged: half an hour
#   make train                           the models that ship, from packages alone: hours, resumable
#   make train-256                       1,300 things at 256 pixels: 25 minutes of a GPU, resumable
#
# On Linux the package index has PyTorch built for CUDA, which is several GB. To get the build for
# CPUs alone, name PyTorch's index of those:  make picture TORCH_INDEX=<its address>

PYTHON ?= python3
PROMPT ?= a red apple
OUT ?= picture.png
ARGS ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# The pip of PYTHON installs into .venv, so that Debian's split-off python3-venv is not needed.
# Without build isolation the constraints hold for what builds packages, too.
INSTALL := $(PYTHON) -m pip --python $(BIN)/python install --constraint constraints.txt

.PHONY: picture test lint format bench soak evaluate train train-256 clean
.DELETE_ON_ERROR:

export PROMPT OUT
picture: $(VENV)/.ready
	@$(BIN)/safelight generate --out "$$OUT" --overwrite $(ARGS) -- "$$PROMPT"

test: $(VENV)/.ready-dev
	$(BIN)/pytest

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.ready-dev
	$(INSTALL) --no-build-isolation --editable '.[bench]'
	$(BIN)/safelight bench $(ARGS)
	$(BIN)/python benchmarks/full_size.py --dtype bfloat16
	$(BIN)/python benchmarks/batching.py

# The suite's own tests of the promises, with their full numbers; their figures: runs/soak.txt.
SOAK := faults killed overload same storage strangers
soak: $(VENV)/.ready-dev
	mkdir -p runs
	SAFELIGHT_SOAK=$(CURDIR)/runs/soak.txt $(BIN)/pytest -n0 $(SOAK:%=tests/server/test_%.py) tests/prompt/test_reading.py
	$(BIN)/python tests/soak/kills.py $(ARGS)
	$(BIN)/python tests/soak/training.py --steps 200

evaluate: data/cutouts.npz
	$(INSTALL) --no-build-isolation --editable '.[evaluate]'
	$(BIN)/safelight train evaluate --data data --out runs/evaluation

data/cutouts.npz: | $(VENV)/.ready-dev
	$(BIN)/safelight train data data

train: data/cutouts.npz
	$(BIN)/safelight train embedded --data data --out runs
	$(BIN)/safelight train embedded-fast --data data --out runs --model runs/embedded
	$(BIN)/safelight train embedded-unconditional --data data --out runs

data/256/cutouts.npz: | $(VENV)/.ready-dev
	$(BIN)/safelight train data data/256 --whole

train-256: data/256/cutouts.npz
	$(BIN)/safelight train embedded-256 --data data/256 --out runs/256

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Safelight needs Python 3.11 or later: make PYTHON=python3.11 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) --no-build-isolation --editable '.[dev,train]'
	@touch $@
