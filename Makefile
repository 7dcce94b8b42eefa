# Everything works from a bare Python 3.10+ and a C++ compiler: `make test` installs what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH_INSTALLED := $(VENV)/.torch

# Unlike `-c`, these also hold in the isolated environment that builds the package.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint gpu carry bench install clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## prune a small network with every criterion: table and picture in out/
	$(BIN)/singe demo --out out

test: $(INSTALLED)  ## the whole suite, ruff and mypy included; ARGS="-k name" chooses
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu:  ## everything that needs a CUDA device, with the torch that is there (see benchmarks/gpu.sh)
	bash benchmarks/gpu.sh

carry:  ## fill .carry/ with what a GPU machine without a network lacks: wheels, data, models
	mkdir -p .carry/wheels
	$(PYTHON) -m pip download -q --no-deps -d .carry/wheels $$(grep '^torch-pruning==' constraints.txt)
	cp -rn "$${SINGE_DATA:-../shared}"/data "$${SINGE_DATA:-../shared}"/models .carry/

bench: $(INSTALLED)  ## measure speed on this machine (examples need SINGE_DATA or ../shared)
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.scoring
	$(BIN)/python -m benchmarks.budgets
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.resume

install: $(INSTALLED)  ## create .venv with pinned versions and the compiled core

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) build dist out *.egg-info singe/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: it is the one download that takes minutes.
$(TORCH_INSTALLED): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	touch $@

# torchvision (test models) without dependencies: nothing of it may replace the torch above.
$(INSTALLED): $(TORCH_INSTALLED) pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install -e '.[demo,export,test]'
	$(BIN)/python -m pip install --no-deps torchvision==0.28.0 pillow
	touch $@
